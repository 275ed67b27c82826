"""How a level is shared out between blocks: the same everywhere, or by outliers (OWL).

Yin et al.: Outlier Weighed Layerwise Sparsity (2023), arXiv:2310.05175.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sparse_ft.pruning.histogram import exact_count

__all__ = ["outlier_share", "owl_deviations", "owl_sparsities", "row_counts", "tensor_counts"]


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


def owl_sparsities(level: float, deviations: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
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
    at_least: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Weights to prune per tensor and level: they add up to round(level * n) and grow with the level.

    Args:
        levels: ascending.
        sizes: weights per tensor.
        shares: the sparsity of each tensor at each level, as fractions.
        at_least: weights already pruned per tensor.
    """
    names = sorted(sizes)
    counts: dict[str, list[int]] = {name: [] for name in names}
    previous = dict(at_least) if at_least else dict.fromkeys(names, 0)
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
