"""The arithmetic of a LoRA under a mask as ModelZoo trains and merges it: one function for forward and merge."""

from __future__ import annotations

import torch

__all__ = ["merged_weight"]


def merged_weight(
    weight: torch.Tensor,
    factor_a: torch.Tensor,
    factor_b: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``W + s B A``, its second term only where ``mask`` is True (everywhere without one).

    The mask is applied by `torch.where`, as cerebras.pytorch applies its own to gradients: the wafer's compiler
    lowers that, and what is not finite in a masked place does not spread.

    Args:
        weight: ``[out, in]``, pruned already where it is sparse.
        factor_a: ``[r, in]``.
        factor_b: ``[out, r]``.
        mask: boolean ``[out, in]``, True = kept.
    """
    delta = torch.matmul(factor_b, factor_a) * scaling
    return weight + (delta if mask is None else torch.where(mask, delta, torch.zeros_like(delta)))
