"""SparseGPT on one matrix: prune column by column, and let the columns after it answer.

Frantar & Alistarh: SparseGPT (ICML 2023), arXiv:2301.00774. The mask may be SparseGPT's own (`choose`) or given
(`update`): the reconstruction of the columns that stay is the same.
"""

from __future__ import annotations

import torch

from sparse_ft.pruning.patterns import group_mask, layer_mask
from sparse_ft.pruning.rules import Inputs

__all__ = ["choose", "inverse_factor", "prune_columns", "update", "update_columns"]

_BLOCK = 128
_TRIES = 5


def choose(
    weight: torch.Tensor,
    inputs: Inputs,
    k: int = 0,
    pattern: tuple[int, int] | None = None,
    pruned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT's mask and weights of one matrix; see `prune_columns`."""
    if inputs.hessian is None:
        inputs.note("no calibration token came here; pruned by magnitude, without weight update")
    return prune_columns(weight, *inputs.once(_factor), k=k, pattern=pattern, pruned=pruned)


def update(weight: torch.Tensor, kept: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """SparseGPT's weights under a given mask; see `update_columns`."""
    if inputs.hessian is None:
        inputs.note("no calibration token came here; its weights are not updated")
    return update_columns(weight, inputs.once(_factor)[0], kept)


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
            scores = _scores(part, diagonal).masked_fill(dead[begin:end], 0)
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
                scores = _scores(part[:, ahead], diagonal[ahead]).masked_fill(dead[begin:end][ahead], 0)
                mask[:, ahead] = group_mask(scores, *pattern)
            errors[:, column] = _answer(part, column, mask[:, column], inner)
        part.masked_fill_(~mask, 0)  # the subtraction leaves rounding where zero is meant
        new[:, end:] -= errors @ factor[begin:end, end:]
        kept[:, begin:end] = mask
    return new, kept


def update_columns(weight: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor, block: int = _BLOCK) -> torch.Tensor:
    """Prunes what a mask prunes, column by column, and lets the kept weights of the columns after it answer.

    Args:
        weight: float32 ``[R, C]``. Not modified.
        factor: from `inverse_factor`.
        kept: bool ``[R, C]``, True = kept.
        block: columns that are worked on together; of no consequence but for rounding.

    Returns:
        the new weights, zero where pruned.
    """
    new = weight.clone()
    for begin in range(0, weight.shape[1], block):
        end = min(begin + block, weight.shape[1])
        part, mask, inner = new[:, begin:end], kept[:, begin:end], factor[begin:end, begin:end]
        errors = torch.stack([_answer(part, column, mask[:, column], inner) for column in range(end - begin)], dim=1)
        part.masked_fill_(~mask, 0)  # the subtraction leaves rounding where zero is meant
        new[:, end:] -= errors @ factor[begin:end, end:]
    return new


def _scores(weight: torch.Tensor, factor_diagonal: torch.Tensor) -> torch.Tensor:
    """w^2 / d^2: the error of removing w when the weights after it may answer.

    Args:
        weight: float32 ``[R, C]``.
        factor_diagonal: float32 ``[C]``, the diagonal of the upper Cholesky factor of the inverse Hessian.
    """
    return (weight / factor_diagonal).square()


def _answer(part: torch.Tensor, column: int, kept: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Removes what is not kept of a column, in place: those after it in the block take its part. Returns the error
    ``[R]`` that the columns after the block have to answer for."""
    error = part[:, column].masked_fill(kept, 0) / inner[column, column]
    part[:, column:] -= error[:, None] * inner[column, column:]
    return error


def _factor(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`inverse_factor` of the inputs; where no token came, one under which no column answers for another."""
    if inputs.hessian is None:
        dead = torch.zeros(inputs.columns, dtype=torch.bool, device=inputs.device)
        return torch.eye(inputs.columns, device=inputs.device), dead
    factor, dead, damping = inverse_factor(inputs.hessian)
    if damping > 0.011:
        inputs.note(f"Cholesky failed with damping 0.01 and passed with {damping:g}")
    return factor, dead


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
