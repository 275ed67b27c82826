"""Better masks for weights that keep their values: swap a kept and a pruned weight of a row while that helps.

Zimmer et al.: SparseSwaps (2025), arXiv:2512.10922.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from sparse_ft.pruning.patterns import row_mask
from sparse_ft.pruning.rules import Inputs

__all__ = ["refine", "swap_together", "swap_weights"]

_LIMIT = 100
_PAIRS = 2**26  # pairs of weights looked at together on an accelerator: 256 MiB a temporary
_NEVER = 1e30  # what it costs to swap a weight that is no candidate; finite, as the compiled loop's arithmetic needs
_LEVELS = 8
_FAST = {"nnan", "nsz", "reassoc", "contract"}  # without which a minimum is not vectorised
_NOISE = 1e-7  # of the row's error: a smaller gain may be rounding


def refine(
    weight: torch.Tensor,
    kept: torch.Tensor,
    inputs: Inputs,
    pattern: tuple[int, int] | None = None,
    pruned: torch.Tensor | None = None,
) -> torch.Tensor:
    """A mask with a smaller error and as many weights in every row (in every group of ``pattern``); see `swap_weights`.

    Args:
        weight: float32 ``[R, C]``. Not modified.
        kept: bool ``[R, C]``, True = kept. Not modified.
        pruned: bool ``[R, C]``, weights that go in any case (nested levels). Where the mask keeps some of a row, as
            many others stay instead, of those that it prunes the ones with the highest |w| ||x||.
    """
    if pruned is not None and bool((kept & pruned).any()):
        norms = weight.new_ones(inputs.columns) if inputs.hessian is None else inputs.hessian.diagonal().sqrt()
        scores = (weight.abs() * norms).masked_fill(kept, torch.finfo(weight.dtype).max)
        kept = row_mask(scores, (~kept).sum(1).cpu().numpy(), pruned)
    if inputs.hessian is None:
        inputs.note("no calibration token came here; its mask is not refined")
        return kept
    return swap_weights(weight, kept, inputs.hessian, pattern[1] if pattern else None, pruned)[0]


def swap_weights(
    weight: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    group: int | None = None,
    pruned: torch.Tensor | None = None,
    limit: int = _LIMIT,
) -> tuple[torch.Tensor, int]:
    """Lowers e G e^T of every row, e the weights that its mask prunes, by the best swap as often as one helps.

    With c = G e, to prune u and keep p instead changes a row's error by
    2 w_u c_u + w_u^2 G_uu - 2 w_p c_p + w_p^2 G_pp - 2 w_u w_p G_up. The best of all pairs is taken.

    Args:
        weight: float32 (or float64) ``[R, C]``. Not modified.
        mask: bool ``[R, C]``, True = kept. Not modified.
        gram: G = X^T X of the inputs, ``[C, C]``, of the weight's dtype.
        group: swap only within this many consecutive columns (N:M); it must divide C. Default: within the row.
        pruned: bool ``[R, C]``, weights that stay pruned (nested levels).
        limit: swaps of one row at most.

    Returns:
        the mask, which keeps as many weights of each row (and group) as before; how many swaps it took.
    """
    if weight.device.type != "cpu":
        return swap_together(weight, mask, gram, group, pruned, limit)
    locked = torch.zeros_like(mask) if pruned is None else pruned
    kept = mask.clone(memory_format=torch.contiguous_format)
    arrays = (tensor.contiguous().numpy() for tensor in (weight, locked, gram))
    return kept, int(_swap_rows(kept.numpy(), *arrays, group or weight.shape[1], limit))


def swap_together(
    weight: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    group: int | None = None,
    pruned: torch.Tensor | None = None,
    limit: int = _LIMIT,
) -> tuple[torch.Tensor, int]:
    """As `swap_weights`, one swap of all rows at a time, by tensor operations over all pairs: for accelerators."""
    kept, swaps, columns = mask.clone(), 0, weight.shape[1]
    group = group or columns
    tiles = gram.view(columns // group, group, columns // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, _PAIRS // (columns * group))):
        c = (weight[rows] * ~kept[rows]) @ gram
        for _ in range(limit):
            w, stays = weight[rows], kept[rows]
            locked = stays if pruned is None else stays | pruned[rows]
            cross, square = 2 * w * c, w.square() * gram.diagonal()
            leave = (square + cross).masked_fill_(~stays, _NEVER).view(len(rows), -1, group, 1)
            enter = (square - cross).masked_fill_(locked, _NEVER).view(len(rows), -1, 1, group)
            change = w.view(leave.shape) * w.view(enter.shape)
            change = change.mul_(tiles).mul_(-2).add_(leave).add_(enter).flatten(1)
            least, place = change.min(1)
            better = least < -_NOISE * (w * ~stays * c).sum(1)
            if not bool(better.any()):
                break
            rows, c, place = rows[better], c[better], place[better]
            first = place // group**2 * group
            out, back = first + place // group % group, first + place % group
            c = c + weight[rows, out, None] * gram[out] - weight[rows, back, None] * gram[back]
            kept[rows, out], kept[rows, back] = False, True
            swaps += len(rows)
    return kept, swaps


@njit(cache=True, nogil=True)
def _swap_rows(kept, weight, locked, gram, group, limit):
    """All swaps of one row after the other, ``kept`` in place; returns their number.

    A pair is sought in the weight's dtype, and judged in float64, in which c is kept too.
    """
    rows, columns = weight.shape
    levels = _ceilings(gram)
    c = np.empty(columns, np.float64)
    parts = np.empty((4, columns), weight.dtype)
    swaps = 0
    for r in range(rows):
        w = weight[r]
        c[:] = 0
        for p in range(columns):
            if not kept[r, p]:
                for i in range(columns):
                    c[i] += np.float64(w[p]) * gram[p, i]
        for _ in range(limit):
            out, back = _best_pair(w, kept[r], locked[r], gram, c, group, levels, parts)
            if back < 0:
                break
            old, new = np.float64(w[out]), np.float64(w[back])
            change = 2 * old * c[out] + old * old * gram[out, out] - 2 * new * c[back] + new * new * gram[back, back]
            change -= 2 * old * new * gram[out, back]
            error = 0.0
            for p in range(columns):
                if not kept[r, p]:
                    error += w[p] * c[p]
            if change >= -_NOISE * error:
                break
            kept[r, out], kept[r, back] = False, True
            for i in range(columns):
                c[i] += old * gram[out, i] - new * gram[back, i]
            swaps += 1
    return swaps


@njit(cache=True, nogil=True)
def _best_pair(w, kept, locked, gram, c, group, levels, parts):
    """The kept u and the pruned p of one row whose swap changes its error least: (u, p), or -1 for none.

    Most u are passed over unseen: where |G_up| <= t sqrt(G_uu G_pp) for all p, a swap of u changes the error by
    2 w_u c_u + (1 - t) w_u^2 G_uu at least, plus the least of (1 - t) w_p^2 G_pp - 2 w_p c_p. The t are rounded up
    to eighths, so that this least value is sought nine times a swap and not once for each u.

    Args:
        levels: t of every u, in eighths.
        parts: ``[4, C]``, overwritten.
    """
    columns, never = w.size, w.dtype.type(_NEVER)
    leave, enter, square, bound = parts[0], parts[1], parts[2], parts[3]
    for i in range(columns):
        cross = 2 * np.float64(w[i]) * c[i]
        square[i] = np.float64(w[i]) * w[i] * gram[i, i]
        leave[i] = square[i] + cross
        enter[i] = never if kept[i] or locked[i] else square[i] - cross
    entries = np.empty(_LEVELS + 1, w.dtype)
    for level in range(_LEVELS + 1):
        entries[level] = _least(enter, square, w.dtype.type(level / _LEVELS))
    first = -1
    for u in range(columns):
        bound[u] = never
        if kept[u]:
            bound[u] = leave[u] - w.dtype.type(levels[u] / _LEVELS) * square[u] + entries[levels[u]]
            if first < 0 or bound[u] < bound[first]:
                first = u
    least, out, back = never, -1, -1
    for turn in range(-1, columns):  # the most promising u first, so that the others are soon passed over
        u = first if turn < 0 else turn
        if u < 0 or bound[u] >= least:
            continue
        begin = u // group * group
        end = begin + group
        value = leave[u] + _least_pair(enter[begin:end], w[begin:end], gram[u, begin:end], 2 * w[u])
        if value < least:
            least, out = value, u
    if out < 0:
        return -1, -1
    least = never
    for p in range(out // group * group, out // group * group + group):
        value = enter[p] - 2 * w[out] * w[p] * gram[out, p]
        if value < least:
            least, back = value, p
    return out, back


@njit(cache=True, nogil=True)
def _ceilings(gram):
    """The largest |G_up| / sqrt(G_uu G_pp) over the p of every u, in eighths, rounded up: int64 ``[C]``."""
    columns = len(gram)
    levels = np.zeros(columns, np.int64)
    for u in range(columns):
        largest = 0.0
        for p in range(columns):
            if p != u and gram[u, p] != 0:
                largest = max(largest, abs(gram[u, p]) / np.sqrt(np.float64(gram[u, u]) * gram[p, p]))
        levels[u] = min(_LEVELS, int(np.ceil(largest * _LEVELS * (1 + 1e-6))))
    return levels


@njit(cache=True, nogil=True, fastmath=_FAST)
def _least(enter, square, t):
    low = enter[0] - t * square[0]
    for p in range(1, enter.size):
        low = min(low, enter[p] - t * square[p])
    return low


@njit(cache=True, nogil=True, fastmath=_FAST)
def _least_pair(enter, w, gram, twice):
    """The least change when one weight leaves and any other enters, but for what the leaving one costs alone."""
    low = enter[0] - twice * w[0] * gram[0]
    for p in range(1, enter.size):
        low = min(low, enter[p] - twice * w[p] * gram[p])
    return low
