"""SparseGPT on one matrix: prune column by column, and let the columns after it answer.

Frantar & Alistarh: SparseGPT (ICML 2023), arXiv:2301.00774.
"""

from __future__ import annotations

import torch

from sparse_ft.pruning.importance import sparsegpt as score
from sparse_ft.pruning.patterns import group_mask, layer_mask

__all__ = ["inverse_factor", "prune_columns"]

_BLOCK = 128
_TRIES = 5


def inverse_factor(hessian: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Upper Cholesky factor U of the inverse of a damped Hessian: H^-1 = U^T U.

    Args:
        hessian: float32 ``[C, C]``, X^T X over the tokens up to a factor. Not modified.
        damping: this fraction of the mean diagonal is added to the diagonal. If the factorisation fails it is
            tried again with ten times as much, up to four times.

    Returns:
        U float32 ``[C, C]``; dead, bool ``[C]``: inputs that were always zero; the damping that was used.

    Raises:
        RuntimeError: no damping helped; the Hessian holds NaN or infinities.
    """
    dead = hessian.diagonal() == 0
    base = hessian.clone()
    base.diagonal()[dead] = 1
    mean = base.diagonal().mean()
    for _ in range(_TRIES):
        damped = base.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item() and bool(torch.isfinite(lower).all()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.item() and bool(torch.isfinite(upper).all()):
                return upper, dead, damping
        damping *= 10
    raise RuntimeError(f"the Hessian cannot be factorised, even with damping {damping / 10:g}")


def prune_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    dead: torch.Tensor,
    k: int = 0,
    pattern: tuple[int, int] | None = None,
    pruned: torch.Tensor | None = None,
    block: int = _BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes exactly ``k`` weights of a matrix, or N of every M, and updates those that stay.

    In every block of columns the lowest scores over all rows go; blocks share ``k`` in proportion.

    Args:
        weight: float32 ``[R, C]``. Not modified.
        factor: from `inverse_factor`.
        dead: from `inverse_factor`.
        k: weights to prune, without ``pattern``.
        pattern: (N, M): keep N of every M columns; M must divide C.
        pruned: bool ``[R, C]``, weights that go in any case (nested levels); at most ``k``.
        block: columns whose scores are compared with each other.

    Returns:
        the new weights (zero where pruned) and the mask, True = kept.
    """
    rows, columns = weight.shape
    new, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    group = pattern[1] if pattern else 1
    step = max(1, block // group) * group  # a group must not be cut by a block's border
    done = 0
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        part = new[:, begin:end]
        inner = factor[begin:end, begin:end]
        diagonal = inner.diagonal()
        if pattern is None:
            scores = score(part, diagonal).masked_fill(dead[begin:end], 0)
            before = None if pruned is None else pruned[:, begin:end]
            count = _block_share(k, done, rows, columns, begin, end, pruned)
            mask = layer_mask(scores, count, before)
            done += count
        else:
            mask = torch.ones_like(part, dtype=torch.bool)
        errors = torch.zeros_like(part)
        for column in range(end - begin):
            if pattern is not None and column % group == 0:
                # Scored when its turn comes, after the columns before it have been answered for.
                ahead = slice(column, column + group)
                scores = score(part[:, ahead], diagonal[ahead]).masked_fill(dead[begin:end][ahead], 0)
                mask[:, ahead] = group_mask(scores, *pattern)
            error = part[:, column].masked_fill(mask[:, column], 0) / inner[column, column]
            part[:, column:] -= error[:, None] * inner[column, column:]
            errors[:, column] = error
        part.masked_fill_(~mask, 0)  # the subtraction leaves rounding where zero is meant
        new[:, end:] -= errors @ factor[begin:end, end:]
        kept[:, begin:end] = mask
    return new, kept


def _block_share(k: int, done: int, rows: int, columns: int, begin: int, end: int, pruned: torch.Tensor | None) -> int:
    """Weights to prune in columns begin..end so that the whole can still come to ``k`` exactly."""
    size, after = rows * (end - begin), rows * (columns - end)
    wanted = round(k * end / columns) - done
    forced = forced_after = 0
    if pruned is not None:
        forced, forced_after = int(pruned[:, begin:end].sum()), int(pruned[:, end:].sum())
    lowest = max(forced, k - done - after, 0)
    highest = min(size, k - done - forced_after)
    return min(max(wanted, lowest), highest)
