"""The k-th smallest of many values, and masks from it: exact, without a sort, where the values lie."""

from __future__ import annotations

import torch

__all__ = ["group_bounds", "keep_largest", "kth_smallest"]

_BINS = 2048


def kth_smallest(values: torch.Tensor, k: int, bins: int | None = None) -> float:
    """The k-th smallest value, 1 <= k <= n.

    Args:
        values: float, any shape, without NaN. On the CPU it is reordered in place; a contiguous tensor is needed.
        bins: of the histogram that narrows the search; None on the CPU: numpy's selection, which needs none.
    """
    if values.device.type == "cpu" and bins is None:
        flat = values.view(-1).numpy()
        flat.partition(k - 1)
        return float(flat[k - 1])
    # torch.kthvalue walks through one vector with a single thread block, so it is given the few that matter.
    low, high = (float(edge) for edge in values.aminmax())
    if low == high:
        return low
    ends = torch.histc(values, bins or _BINS, low, high).to(torch.int64).cumsum(0)
    width = (high - low) / len(ends)
    place = int(torch.searchsorted(ends, k))
    low, high = low + (place - 1) * width, low + (place + 2) * width  # a bin more on each side, for its rounding
    inside = values[(values >= low) & (values <= high)]
    below = int((values < low).sum())
    if below < k <= below + len(inside):
        return float(inside.kthvalue(k - below).values)
    return float(values.flatten().kthvalue(k).values)


def keep_largest(magnitudes: torch.Tensor, k: int, pruned: torch.Tensor | None = None) -> torch.Tensor:
    """The mask that prunes the ``k`` smallest magnitudes, ties by position as `patterns.layer_mask` breaks them.

    Args:
        magnitudes: float ``[R, C]``, none below 0.
        k: 0..n.
        pruned: bool ``[R, C]``, these go first (nested levels).

    Returns:
        bool ``[R, C]`` on the magnitudes' device, True = kept.
    """
    if k == 0:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    values = (magnitudes if pruned is None else magnitudes.masked_fill(pruned, -1)).contiguous()
    bound = kth_smallest(values.clone(), k)
    kept = values > bound
    spared = kept.numel() - int(kept.sum()) - k
    if spared:  # of those equal to the bound the last ones stay
        equal = (values == bound).flatten().nonzero().flatten()
        kept.view(-1)[equal[len(equal) - spared :]] = True
    return kept


def group_bounds(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count``-th smallest of each group, ``[..., 1, G]``: what is not above it goes.

    Args:
        magnitudes: float ``[..., M, G]``: G groups of M, a group's members apart, so that all is done on planes.
        count: 1..M.
    """
    planes = list(magnitudes.unbind(-2))
    for _ in range(count):  # bubbles the smallest out of the planes
        smallest, rest = planes[0], []
        for plane in planes[1:]:
            rest.append(torch.maximum(smallest, plane))
            smallest = torch.minimum(smallest, plane)
        planes = rest
    return smallest.unsqueeze(-2)
