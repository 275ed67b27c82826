"""ALPS: which weights go and what the others become, by ADMM with a growing penalty.

Meng, Behdin, Wang, Mazumder: ALPS (NeurIPS 2024), arXiv:2406.07831, algorithm 1 and section 3.2. Instead of one
eigendecomposition in float64 there is a Cholesky inverse in float32 for each penalty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import hardshrink

from sparse_ft.pruning.hessian import Normalised, normalised
from sparse_ft.pruning.patterns import group_mask
from sparse_ft.pruning.refit import solve_on_support
from sparse_ft.pruning.rules import Inputs
from sparse_ft.pruning.selection import group_bounds, keep_largest, kth_smallest

__all__ = ["alps", "choose", "kept_inverses"]

_FIRST_PENALTY, _LEAST_PENALTY, _LAST_PENALTY = 0.1, 1e-3, 1e6
_LOOK = 3  # iterations between two looks at the support
_SETTLED = 3e-4  # of the kept weights: so few changed that the rest is not worth its iterations
_REFIT, _TOLERANCE = 10, 3e-4
_ROOM = 2**28  # bytes of inverses that are kept for the other matrices with the same inputs

Inverses = Callable[[float], torch.Tensor]


def choose(
    weight: torch.Tensor,
    inputs: Inputs,
    k: int = 0,
    pattern: tuple[int, int] | None = None,
    pruned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ALPS's mask and weights of one matrix; see `alps`. Where no token came the smallest magnitudes go."""
    if inputs.hessian is None:
        inputs.note("no calibration token came here; pruned by magnitude, without weight update")
        kept = keep_largest(weight.abs(), k, pruned) if pattern is None else group_mask(weight.abs(), *pattern)
        return weight * kept, kept
    hessian = inputs.once(normalised)
    return alps(weight, hessian, k, pattern, pruned, inverses=inputs.once(_shared_inverses))


def alps(
    weight: torch.Tensor,
    hessian: Normalised,
    k: int = 0,
    pattern: tuple[int, int] | None = None,
    pruned: torch.Tensor | None = None,
    iterations: int = 300,
    inverses: Inverses | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes exactly ``k`` weights of a matrix, or N of every M, and gives those that stay their best values.

    Args:
        weight: float32 (or float64) ``[R, C]``. Not modified.
        hessian: of the inputs, ``[C, C]``.
        k: weights to prune, without ``pattern``.
        pattern: (N, M): keep N of every M columns; M must divide C.
        pruned: bool ``[R, C]``, weights that go in any case (nested levels); at most ``k``. Not with ``pattern``.
        iterations: of ADMM, at most; the support settles after 30 to 40.
        inverses: `kept_inverses` of the Hessian's matrix, where other weights have the same inputs.

    Returns:
        the new weights (zero where pruned) and the mask, True = kept. Takes the memory of six more weights and
        two more Hessians.

    Raises:
        RuntimeError: the Hessian cannot be factorised.
    """
    if pattern is None and k in (0, weight.numel()):
        kept = torch.full_like(weight, k == 0, dtype=torch.bool)
        return weight * kept, kept
    scaled = (weight * hessian.scale).contiguous()
    best = _search(scaled, hessian, k, pattern, pruned, iterations, inverses or kept_inverses(hessian.matrix, 0))
    kept = keep_largest(best.abs(), k, pruned) if pattern is None else group_mask(best.abs(), *pattern)
    support = kept.to(weight.dtype)
    start = torch.where(hessian.dead, scaled, best).mul_(support)
    new = solve_on_support(scaled, support, hessian.matrix, start, _REFIT, _TOLERANCE)
    return torch.where(kept.all(-1, keepdim=True), weight, new.div_(hessian.scale)), kept


def _search(
    scaled: torch.Tensor,
    hessian: Normalised,
    k: int,
    pattern: tuple[int, int] | None,
    pruned: torch.Tensor | None,
    iterations: int,
    inverses: Inverses,
) -> torch.Tensor:
    """Normalised weights whose largest magnitudes are those to keep."""
    if bool(hessian.dead.all()):
        return scaled  # no token came here: magnitudes decide
    target = scaled.masked_fill(hessian.dead, 0)  # what multiplies nothing but zeros goes first
    if pattern is not None:
        return _search_groups(target, hessian.matrix, *pattern, iterations, inverses)
    free = None if pruned is None else (~pruned).to(scaled.dtype)
    kept = scaled.numel() - k
    return _admm(target, hessian.matrix, lambda values: _keep(values, k, free), kept, iterations, inverses)


def _keep(values: torch.Tensor, k: int, free: torch.Tensor | None) -> torch.Tensor:
    """The values without the ``k`` smallest magnitudes; ties at the bound, which between floats are rare, all go."""
    magnitudes = values.abs() if free is None else values.abs().mul_(free)
    kept = hardshrink(values, kth_smallest(magnitudes, k))
    return kept if free is None else kept.mul_(free)


def _search_groups(
    target: torch.Tensor, matrix: torch.Tensor, stay: int, group: int, iterations: int, inverses: Inverses
) -> torch.Tensor:
    """N:M, with the columns in such an order that the members of each group lie in planes of their own."""
    if stay == group:
        return target
    rows, columns = target.shape
    order = torch.arange(columns, device=target.device).view(-1, group).t().flatten()

    def project(values: torch.Tensor) -> torch.Tensor:
        planes = values.view(rows, group, -1)
        magnitudes = planes.abs()
        return planes.mul(magnitudes > group_bounds(magnitudes, group - stay)).view(rows, columns)

    kept = target.numel() // group * stay
    ordered = target[:, order], matrix[order][:, order]
    best = _admm(*ordered, project, kept, iterations, lambda penalty: inverses(penalty)[order][:, order])
    return best[:, order.argsort()]


def _admm(
    target: torch.Tensor,
    matrix: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    kept: int,
    iterations: int,
    inverses: Inverses,
) -> torch.Tensor:
    """B of the last iteration: near the least squares' optimum, and near what ``project`` lets stand.

    Args:
        target: U0 ``[R, C]``.
        matrix: A ``[C, C]``, 1 on the diagonal.
        project: values to new values of which those that go are 0.
        kept: how many weights stay.
        inverses: of A + rho I, by rho.
    """
    linear = target @ matrix
    penalty, moved = _FIRST_PENALTY, False
    inverse = inverses(penalty)
    sparse = project(target)
    last = sparse != 0
    # B + V/rho is split by the projection into D, what is kept, and the rest, which is V/rho of the next iteration.
    split, before = sparse.clone(), penalty
    for iteration in range(1, iterations + 1):
        right = torch.add(linear, split, alpha=-before).add_(sparse, alpha=before + penalty)  # Y - V + rho D
        split.sub_(sparse)
        split.addmm_(right, inverse, beta=before / penalty)
        sparse, before = project(split), penalty
        if iteration % _LOOK:
            continue
        support = sparse != 0
        share = int(torch.count_nonzero(support != last)) / kept
        last, moved = support, moved or share > 0.005
        if moved and (share < _SETTLED or penalty > _LAST_PENALTY):
            break
        if moved:
            penalty *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
        elif penalty > _LEAST_PENALTY:  # too stiff from the beginning: nothing but the largest magnitudes was found
            penalty /= 5
            sparse = project(target)
            split, before, last = sparse.clone(), penalty, sparse != 0
        else:
            break
        inverse = inverses(penalty)
    return right @ inverse


def kept_inverses(matrix: torch.Tensor, room: int = _ROOM) -> Inverses:
    """(A + rho I)^-1 by rho: what was asked for before is not computed again, as far as it was kept.

    Searches with one A begin with the same penalties, and mostly go through the same ones for a while.

    Args:
        matrix: A, ``[C, C]``.
        room: so many bytes are kept, of the first ones asked for.

    Raises:
        RuntimeError: the returned function, where A + rho I cannot be factorised.
    """
    kept: dict[float, torch.Tensor] = {}

    def inverse(penalty: float) -> torch.Tensor:
        if penalty in kept:
            return kept[penalty]
        found = _inverse(matrix, penalty)
        if (len(kept) + 1) * found.nbytes <= room:
            kept[penalty] = found
        return found

    return inverse


def _shared_inverses(inputs: Inputs) -> Inverses:
    return kept_inverses(inputs.once(normalised).matrix)


def _inverse(matrix: torch.Tensor, penalty: float) -> torch.Tensor:
    """(A + rho I)^-1."""
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    lower, failed = torch.linalg.cholesky_ex(shifted)
    if failed.item():
        raise RuntimeError(f"the Hessian cannot be factorised, even with the penalty {penalty:g} on its diagonal")
    return torch.cholesky_inverse(lower)
