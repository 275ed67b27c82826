"""Scores to masks in memory: exact counts, ties by position. Pure functions, True = kept.

The work is done on the CPU by the loops that the streaming engine uses, so that a mask from memory and one
from a file agree to the bit. Scores are compared in float32, in which bfloat16 and float16 are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sparse_ft.errors import UserError
from sparse_ft.masks.histogram import exact_count
from sparse_ft.masks.mask_set import unpack_bits
from sparse_ft.pruning.sources import RandomSource, ScoreSource
from sparse_ft.pruning.streaming import MemorySink, write_global, write_groups, write_layers, write_rows
from sparse_ft.settings.pruning import PruningSettings

__all__ = [
    "compute_random_mask",
    "compute_structured_mask",
    "compute_unstructured_mask",
    "group_mask",
    "layer_mask",
    "row_mask",
    "unstructured_masks",
]

_ONE = "scores"


def unstructured_masks(
    scores: Mapping[str, torch.Tensor], sparsities: Sequence[float], scope: str = "layer"
) -> list[dict[str, torch.Tensor]]:
    """Nested masks of several tensors, one dict per level.

    Args:
        scores: any float dtype; large = keep.
        sparsities: each 0..1.
        scope: ``global`` (one threshold), ``layer`` (per tensor) or ``row``.

    Raises:
        UserError: NaN or infinite scores, a sparsity outside 0..1, an unknown scope.
    """
    PruningSettings(scope=scope, sparsities=tuple(dict.fromkeys(sparsities))).check()
    arrays = {name: value.detach().float().cpu().contiguous().numpy() for name, value in scores.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    source, sink = ScoreSource(shapes, arrays.__getitem__), MemorySink(shapes, len(sparsities))
    if scope == "global":
        write_global(source, sparsities, sink)
    else:
        per_row = scope == "row"
        counts = {
            name: [exact_count(s, shape[-1] if per_row else arrays[name].size) for s in sparsities]
            for name, shape in shapes.items()
        }
        (write_rows if per_row else write_layers)(source, counts, sink)
    return [
        {name: unpack_bits(torch.from_numpy(sink.packed(level, name)), shapes[name][-1]) for name in shapes}
        for level in range(len(sparsities))
    ]


def layer_mask(scores: torch.Tensor, k: int, pruned: torch.Tensor | None = None) -> torch.Tensor:
    """Prunes the ``k`` lowest scores of a tensor.

    Args:
        scores: float ``[..., C]``.
        pruned: bool of the same shape: these go first, whatever their score (nested levels).

    Returns:
        bool of the same shape, on the scores' device.
    """
    return _masks(scores, pruned, lambda source, sink: write_layers(source, {_ONE: [k]}, sink))


def row_mask(scores: torch.Tensor, k: int | np.ndarray, pruned: torch.Tensor | None = None) -> torch.Tensor:
    """Prunes the ``k`` lowest scores of every row (one number, or one for each row); the rest as `layer_mask`."""
    return _masks(scores, pruned, lambda source, sink: write_rows(source, {_ONE: [k]}, sink))


def group_mask(scores: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """N:M: keeps the ``kept`` highest of every ``group`` consecutive scores along the last axis.

    Raises:
        UserError: the last axis is no multiple of ``group``.
    """
    if scores.shape[-1] % group:
        raise UserError(f"Groups of {group} do not divide {scores.shape[-1]} inputs.")
    return _masks(scores, None, lambda source, sink: write_groups(source, kept, group, sink))


def compute_unstructured_mask(
    weight: torch.Tensor, sparsity: float, scores: torch.Tensor | None = None, scope: str = "layer"
) -> torch.Tensor:
    """Mask of one weight that prunes exactly round(sparsity * n) of its entries.

    Args:
        weight: float ``[..., C]``.
        scores: of the weight's shape; default: its magnitudes.
        scope: ``layer``, or ``row`` for round(sparsity * C) in every row.
    """
    scores = weight.abs() if scores is None else scores
    return unstructured_masks({_ONE: scores}, [sparsity], scope)[0][_ONE].to(weight.device)


def compute_structured_mask(
    weight: torch.Tensor, sparsity: float, axis: int = 0, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """Mask of one matrix that prunes whole rows (``axis`` 0) or columns (1) of the lowest mean score.

    For a model use `MaskGenerator` with method ``structured``, which couples the matrices.
    """
    scores = (weight.abs() if scores is None else scores).float()
    means = scores.mean(dim=1 - axis)
    kept = layer_mask(means[None], exact_count(sparsity, means.numel()))[0]
    return (kept[:, None] if axis == 0 else kept[None, :]).expand(weight.shape).clone()


def compute_random_mask(shape: Sequence[int], sparsity: float, seed: int = 0, name: str = "") -> torch.Tensor:
    """Random mask with exactly round(sparsity * n) pruned: a function of seed, name and position alone."""
    shape = tuple(shape)
    sink = MemorySink({name: shape}, 1)
    counts = {name: [exact_count(sparsity, torch.Size(shape).numel())]}
    write_layers(RandomSource({name: shape}, seed), counts, sink)
    return unpack_bits(torch.from_numpy(sink.packed(0, name)), shape[-1])


def _masks(scores: torch.Tensor, pruned: torch.Tensor | None, write) -> torch.Tensor:
    values = scores.detach().float()
    if pruned is not None:
        values = values.masked_fill(pruned, torch.finfo(torch.float32).min)
    array = values.cpu().contiguous().numpy()
    shapes = {_ONE: array.shape}
    sink = MemorySink(shapes, 1)
    write(ScoreSource(shapes, lambda _: array), sink)
    return unpack_bits(torch.from_numpy(sink.packed(0, _ONE)), array.shape[-1]).to(scores.device)
