"""What a layer's inputs make of an error in its weights: tr(D H D^T), with H = X^T X damped and normalised.

Meng et al.: ALPS (NeurIPS 2024), arXiv:2406.07831, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sparse_ft.pruning.rules import Inputs

__all__ = ["DAMPING", "Normalised", "damping_for", "normalise", "normalised"]

DAMPING = 0.01  # of the mean diagonal, as in SparseGPT and ALPS


@dataclass(frozen=True)
class Normalised:
    """A damped Hessian H as scale and correlation: H = matrix * scale * scale^T.

    Attributes:
        matrix: ``[..., C, C]``, symmetric, 1 on the diagonal.
        scale: ``[..., C]``, the root of H's diagonal; 1 for dead inputs.
        dead: bool ``[..., C]``, inputs that were always zero: to nothing else correlated.
        damping: the fraction of the mean diagonal that was added.
    """

    matrix: torch.Tensor
    scale: torch.Tensor
    dead: torch.Tensor
    damping: float


def damping_for(tokens: int, columns: int) -> float:
    """1 %, and more in proportion where fewer tokens than inputs were seen (experts that few tokens reach).

    X^T X then has rank ``tokens`` at most, and without more damping an update fits these few tokens exactly, at
    any price for all others. With a single token the damping outweighs them, and magnitudes decide.
    """
    return DAMPING * max(1.0, columns / max(tokens, 1))


def normalise(hessian: torch.Tensor, damping: float = DAMPING) -> Normalised:
    """Damps a Hessian and divides it by the roots of its diagonal.

    Args:
        hessian: float ``[..., C, C]``, X^T X over the tokens, of one matrix or of every expert. Not modified.
        damping: this fraction of the mean diagonal of the live inputs is added to the diagonal.

    Returns:
        in the Hessian's dtype. Takes the memory of one more Hessian.

    Raises:
        RuntimeError: the Hessian holds NaN or infinities.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise RuntimeError("the Hessian holds NaN or infinities")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    scale = torch.where(dead, 1, diagonal + damping * mean).sqrt()
    matrix = hessian / scale[..., None, :]
    matrix /= scale[..., :, None]
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
    return Normalised(matrix, scale, dead, damping)


def normalised(inputs: Inputs) -> Normalised:
    """`normalise` of inputs that some token reached, damped more where few did, which is noted. For
    `Inputs.once`: matrices that share inputs share it."""
    damping = damping_for(inputs.tokens, inputs.columns)
    if damping > DAMPING:
        inputs.note(f"{inputs.tokens} tokens reached its {inputs.columns} inputs; damped with {damping:.3g}")
    return normalise(inputs.hessian, damping)
