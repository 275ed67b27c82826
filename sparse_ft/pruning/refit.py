"""The best values of the weights that stay: least squares on a mask's support, by conjugate gradients.

Meng et al.: ALPS (NeurIPS 2024), arXiv:2406.07831, algorithm 2. The mask may come from anywhere.
"""

from __future__ import annotations

import torch

from sparse_ft.pruning.hessian import Normalised, normalised
from sparse_ft.pruning.rules import Inputs

__all__ = ["refit", "solve_on_support", "update"]

_ITERATIONS = 30
_TOLERANCE = 1e-3


def update(weight: torch.Tensor, kept: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The best weights under a given mask; see `refit`. Where no token came they stay what they are."""
    if inputs.hessian is None:
        inputs.note("no calibration token came here; its weights are not updated")
        return weight * kept
    return refit(weight, kept, inputs.once(normalised))


def refit(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: Normalised,
    iterations: int = _ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> torch.Tensor:
    """Minimises tr((W - W0) H (W - W0)^T) over all W that are zero where the mask is False.

    Kept weights of dead inputs stay as they are: nothing answers for them, and they answer for nothing. So do rows that
    lose nothing, to the bit.

    Args:
        weight: W0, float32 (or float64) ``[..., R, C]``; a leading dimension is one of experts. Not modified.
        mask: bool of the same shape, True = kept.
        hessian: of the inputs, ``[..., C, C]``: one for all rows of a matrix.
        iterations: at most so many; each is one product of a matrix of the weight's shape with the Hessian.
        tolerance: ends when the residual of all rows together is below this fraction of what it was for W = 0.

    Returns:
        the new weights, exactly zero where pruned. Takes the memory of six more weights.
    """
    scale = hessian.scale[..., None, :]
    solution = solve_on_support(weight * scale, mask.to(weight.dtype), hessian.matrix, None, iterations, tolerance)
    return torch.where(mask.all(-1, keepdim=True), weight, solution.div_(scale))


def solve_on_support(
    target: torch.Tensor,
    support: torch.Tensor,
    matrix: torch.Tensor,
    start: torch.Tensor | None,
    iterations: int = _ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> torch.Tensor:
    """Minimises tr((U - U0) A (U - U0)^T) on a support, every row by itself, all in one product.

    A's diagonal is 1, so that plain conjugate gradients are those preconditioned by H's diagonal.

    Args:
        target: U0, ``[..., R, C]``.
        support: 1 where U may differ from 0, else 0, of the target's dtype.
        matrix: A, ``[..., C, C]``, positive definite.
        start: U to begin with, zero outside the support (modified); default: U0 on the support.
    """
    solution = target * support if start is None else start
    residual = (target @ matrix).mul_(support)
    goal = tolerance * float(residual.norm())
    residual -= (solution @ matrix).mul_(support)
    direction, ahead = residual.clone(), torch.empty_like(residual)
    square = _row_products(residual, residual)
    for _ in range(iterations):
        if float(square.sum()) ** 0.5 <= goal:
            break
        torch.matmul(direction, matrix, out=ahead)
        ahead.mul_(support)
        step = square / _row_products(direction, ahead)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, ahead, value=-1)
        previous, square = square, _row_products(residual, residual)
        direction.mul_(square / previous).add_(residual)
    return solution


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each row of ``a`` with that of ``b``, ``[..., R, 1]``; never 0, so that one can divide by it."""
    return torch.linalg.vecdot(a, b)[..., None].clamp_min(torch.finfo(a.dtype).tiny)
