"""How a level is shared out between blocks: the same everywhere, by outliers (OWL), or by medians (DLP).

Yin et al.: Outlier Weighed Layerwise Sparsity (2023), arXiv:2310.05175. Chen et al.: Dynamic Layerwise Pruning (ICML
2025), arXiv:2505.23807.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sparse_ft.masks.histogram import cut_counts, exact_count
from sparse_ft.pruning.kernels import add_digit_histogram, add_histogram

__all__ = [
    "dlp_deviations",
    "middle_score",
    "outlier_share",
    "owl_deviations",
    "row_counts",
    "sparsities_at",
    "tensor_counts",
]


def outlier_share(scores: Sequence[torch.Tensor], times: float) -> float:
    """Fraction of a block's scores |w| * ||x|| that exceed ``times`` their mean (OWL's D, M = ``times``)."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > times * mean).sum()) for score in scores) / count


def owl_deviations(shares: Sequence[float], spread: float) -> np.ndarray:
    """How much denser than the mean each block is to be, from -spread to spread around their mean.

    Args:
        shares: of outliers, per block.
        spread: OWL's lambda.

    Returns:
        float64 ``[blocks]``, mean 0; zeros if all blocks are alike.
    """
    values = np.asarray(shares, np.float64)
    reach = values.max() - values.min()
    if reach == 0:
        return np.zeros_like(values)
    scaled = (values - values.min()) / reach * 2 * spread
    return scaled - scaled.mean()


def middle_score(scores: Sequence[torch.Tensor]) -> float:
    """The median of a block's scores |w| * ||x|| (the lower one of two), exact, without a copy of them all.

    Args:
        scores: float32, none below 0; read twice, a tensor at a time.
    """
    bits = [score.detach().float().cpu().contiguous().view(torch.int32).numpy().view(np.uint32) for score in scores]
    high, low = np.zeros(65536, np.uint32), np.zeros((1, 65536), np.uint32)
    for keys in bits:  # floats that are not negative are in the order of their bits
        add_histogram((keys >> np.uint32(16)).astype(np.uint16).reshape(-1), high)
    cut = cut_counts(high, [(sum(keys.size for keys in bits) + 1) // 2])[0]
    for keys in bits:
        add_digit_histogram(keys.reshape(-1), np.array([cut.key], np.int64), low)
    fine = cut_counts(low[0], [cut.ties])[0]
    return float(np.array(cut.key << 16 | fine.key, np.uint32).view(np.float32))


def dlp_deviations(medians: Sequence[float], spread: float) -> np.ndarray:
    """How much denser than the mean each block is to be: the more, the lower its median score (DLP).

    A block's relative importance is 1 - median / sum of the medians, brought to -spread to spread around its mean.

    Args:
        medians: of the scores |w| * ||x||, per block.
        spread: DLP's alpha; the paper takes 0.15.

    Returns:
        float64 ``[blocks]``, mean 0; zeros if all blocks are alike.
    """
    values = np.asarray(medians, np.float64)
    return owl_deviations(1 - values / max(values.sum(), np.finfo(np.float64).tiny), spread)


def sparsities_at(level: float, deviations: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Sparsity of each block: level - deviation, shifted so that the whole is at the level exactly.

    Where level - deviation leaves 0..1 it is clipped and the others make up for it. Each block's value grows
    with the level, so levels nest; 0.0 and 1.0 give 0 and 1 everywhere.

    Args:
        sizes: weights per block.
    """
    weights = np.asarray(sizes, np.float64) / sum(sizes)

    def excess(shift: float) -> float:
        return float(np.clip(shift - deviations, 0, 1) @ weights) - level

    low, high = float(deviations.min()), float(deviations.max()) + 1
    for _ in range(100):  # bisection: excess grows with the shift
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return np.clip(high - deviations, 0, 1) if level >= 1 else np.clip(low - deviations, 0, 1)


def row_counts(total: int, rows: int) -> np.ndarray:
    """``total`` weights shared out over rows: int64 ``[rows]``, alike but for one weight more in the first.

    Each row's count grows with ``total``, so levels nest.
    """
    return (total + rows - 1 - np.arange(rows)) // rows


def tensor_counts(
    levels: Sequence[float],
    sizes: Mapping[str, int],
    shares: Mapping[str, Sequence[float]],
) -> dict[str, list[int]]:
    """Weights to prune per tensor and level: they add up to round(level * n) and grow with the level.

    Args:
        levels: ascending.
        sizes: weights per tensor.
        shares: the sparsity of each tensor at each level, as fractions.
    """
    names = sorted(sizes)
    counts: dict[str, list[int]] = {name: [] for name in names}
    previous = dict.fromkeys(names, 0)
    for index, level in enumerate(levels):
        wanted = exact_count(level, sum(sizes.values()))
        exact = {name: shares[name][index] * sizes[name] for name in names}
        now = {name: min(max(int(exact[name]), previous[name]), sizes[name]) for name in names}
        # Largest remainders first; rounding may also have to be taken back where an earlier level rounded up.
        order = sorted(names, key=lambda name: int(exact[name]) - exact[name])
        while (gap := wanted - sum(now.values())) != 0:
            step = 1 if gap > 0 else -1
            free = [n for n in order if (now[n] < sizes[n] if step > 0 else now[n] > previous[n])]
            for name in (free if step > 0 else free[::-1])[: abs(gap)]:
                now[name] += step
        for name in names:
            counts[name].append(now[name])
        previous = now
    return counts
