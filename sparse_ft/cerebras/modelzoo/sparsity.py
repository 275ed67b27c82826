"""Our exact masks inside cerebras.pytorch's sparsity: what the wrapper and the ModelZoo callback share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import cerebras.pytorch as cstorch
import torch
from torch import nn

from sparse_ft.errors import UserError

__all__ = ["attach_masks", "holds_sparse_parameters"]


def attach_masks(
    module: nn.Module, masks: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None = None
) -> cstorch.sparse.Group:
    """Makes ``module`` train under ``masks``: pruned weights stay zero, and so do their gradients and moments.

    A `cerebras.pytorch.sparse.Group` with one `Static` per distinct sparsity is applied, each with the sparsity
    measured on its tensors (on a wafer the compiler lays out memory by it). Then the masks themselves are loaded
    as the buffers ``NAME_mask``: an initialiser such as ``from_zeros`` would also prune kept weights that happen
    to be zero.

    Args:
        module: what the Trainer or the training step calls; a backend must exist.
        masks: boolean masks by the module's parameter names, True = kept; looked up one at a time.
        optimizer: a `cerebras.pytorch.optim` optimizer. It is made sparse only where it holds masked parameters:
            with frozen weights under an adapter its first step would raise.

    Returns:
        the group; keep it alive as long as the module trains.

    Raises:
        UserError: a name the module does not have, a shape that differs, a tensor pruned to nothing, or an
            optimizer of plain PyTorch.
    """
    parameters = dict(module.named_parameters())
    unknown = sorted(set(masks) - set(parameters))
    if unknown:
        raise UserError(
            f"The model has no parameter {unknown[0]} ({len(unknown)} of {len(masks)} masks have no place)."
        )
    names_by_sparsity: dict[float, set[str]] = {}
    for name in masks:
        mask = masks[name]
        if parameters[name].shape != mask.shape:
            raise UserError(f"Mask {name} is {tuple(mask.shape)}, the weight {tuple(parameters[name].shape)}.")
        sparsity = 1.0 - int(mask.sum()) / mask.numel()
        if sparsity == 1.0:
            raise UserError(f"The mask of {name} prunes every weight; cerebras.pytorch takes sparsities below 1.")
        names_by_sparsity.setdefault(sparsity, set()).add(name)
    # A process that only compiles never looks at a mask, and one of seven billion weights is seven gigabytes.
    backend = cstorch.current_backend(raise_exception=False, raise_warning=False)
    runs = backend is None or not backend.is_csx or backend.is_e2e_execution
    group = cstorch.sparse.Group()
    for sparsity, names in sorted(names_by_sparsity.items()):
        group.add(_is_one_of(names), cstorch.sparse.Static(sparsity=sparsity, init_method="from_zeros"))
    group.apply(module)
    if runs:
        for name in masks:
            incomplete = module.load_state_dict({f"{name}_mask": masks[name]}, strict=False)
            if incomplete.unexpected_keys:
                raise RuntimeError(f"cerebras.pytorch made no mask buffer {incomplete.unexpected_keys[0]}")
    if optimizer is not None and holds_sparse_parameters(optimizer, (parameters[name] for name in masks)):
        if not isinstance(optimizer, cstorch.optim.Optimizer):
            raise UserError(
                f"{type(optimizer).__module__}.{type(optimizer).__name__} cannot train sparse weights: use"
                " cerebras.pytorch.optim, which keeps pruned weights out of its moments."
            )
        group.apply(optimizer)
    return group


def holds_sparse_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether the optimizer updates any of ``parameters``."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for parameter in parameters)


def _is_one_of(names: set[str]):
    return lambda name, _: name in names
