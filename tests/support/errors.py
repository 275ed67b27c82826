"""How far a pruned weight's outputs are from those of the dense one."""

import torch

from sparse_ft.pruning.hessian import Normalised


def output_error(weight: torch.Tensor, original: torch.Tensor, hessian: Normalised) -> float:
    """tr((W - W0) H (W - W0)^T), H the damped Hessian: what pruning is to keep small.

    Args:
        weight: pruned and perhaps updated, ``[..., R, C]``.
        original: what it was before, of that shape.
    """
    change = (weight - original) * hessian.scale[..., None, :]
    return float(((change @ hessian.matrix) * change).sum(dtype=torch.float64))
