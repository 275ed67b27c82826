"""Hugging Face models, PEFT included, training under masks on the CPU backend of cerebras.pytorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import cerebras.pytorch as cstorch
import torch
from torch import nn

from sparse_ft.cerebras.modelzoo.sparsity import attach_masks
from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.names import parameter_masks, prunable_names, slots

__all__ = ["PreparedModel", "SparseModelWrapper", "module_masks", "open_backend", "prepare_sparse_model"]


class SparseModelWrapper(nn.Module):
    """A Hugging Face model in the shape that cerebras.pytorch compiles: ``wrapper(batch)`` gives ``{"loss": ...}``.

    `cerebras.pytorch.compile` sets attributes on the module it is given, and a `PreTrainedModel` refuses
    ``device``; the wrapper takes them instead. CPU backend only: Hugging Face models do not lower to a wafer.

    Raises:
        UserError: the process has a CSX backend.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        _refuse_csx()
        self.model = model

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss of a batch of ``input_ids``, ``labels`` (int64 ``[B, T]``) and, where needed, ``attention_mask``."""
        return {"loss": self.model(**batch).loss}


class PreparedModel(NamedTuple):
    """A model ready to train under its masks.

    Attributes:
        compiled: call this in the training step.
        sparsity: cerebras.pytorch's side of the masks.
        masks: the boolean masks by parameter name of the module.
    """

    compiled: Callable
    sparsity: cstorch.sparse.Group
    masks: dict[str, torch.Tensor]


def open_backend(kind: str = "CPU") -> cstorch.Backend:
    """The process's backend, made if there is none; cerebras.pytorch allows one a process.

    Raises:
        UserError: the process already has a backend of another kind.
    """
    current = cstorch.current_backend(raise_exception=False, raise_warning=False)
    if current is None:
        return cstorch.backend(kind)
    if current.backend_type.name.lower() != kind.lower():
        raise UserError(f"This process has a {current.backend_type.name} backend; {kind} needs a process of its own.")
    return current


def prepare_sparse_model(
    model: nn.Module,
    masks: MaskSet | Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    backend: cstorch.Backend | str | None = None,
) -> PreparedModel:
    """Compiles a wrapped model and puts it, and its optimizer, under exactly these masks.

    Args:
        model: a `SparseModelWrapper`.
        masks: by the checkpoint's tensor names; they must name every prunable tensor.
        optimizer: a `cerebras.pytorch.optim` optimizer over the model's parameters, or None.
        backend: None takes the process's backend, or makes the CPU's.

    Returns:
        the compiled model with its masks. Pruned weights are zero from here on, not only after the first step.

    Raises:
        UserError: masks that do not fit the model, a model that is not wrapped, or a CSX backend.
    """
    if not isinstance(model, SparseModelWrapper):
        raise UserError(f"{type(model).__name__} cannot be compiled by cerebras.pytorch: give a SparseModelWrapper.")
    if backend is None or isinstance(backend, str):
        backend = open_backend(backend or "CPU")
    _refuse_csx()
    by_parameter = module_masks(model, masks)
    compiled = cstorch.compile(model, backend)
    sparsity = attach_masks(model, by_parameter, optimizer)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in by_parameter.items():
            parameters[name].masked_fill_(~mask, 0.0)
    return PreparedModel(compiled, sparsity, by_parameter)


def module_masks(model: nn.Module, masks: MaskSet | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks by the parameter names of a (wrapped, PEFT) Hugging Face model, single experts put together.

    Raises:
        UserError: masks of another architecture, or a model that lacks a prunable parameter.
    """
    if not isinstance(masks, MaskSet):
        masks = MaskSet.from_bool(masks)
    inner = model.model if isinstance(model, SparseModelWrapper) else model
    config = inner.config.to_dict()
    places = {_plain_name(name): name for name, _ in inner.named_parameters()}
    shapes = {plain: tuple(inner.get_parameter(name).shape) for plain, name in places.items()}
    # Where masks name single experts, the module (transformers 5) holds them in one parameter.
    whole = dict(masks) if set(masks) <= set(shapes) else parameter_masks(config, masks)
    expected = {slot.parameter for slot in slots(config, prunable_names(config, shapes)).values()}
    check_masks(MaskSet.from_bool(whole), {name: shapes[name] for name in expected})
    outer = "model." if inner is not model else ""
    return {outer + places[name]: mask for name, mask in whole.items()}


def _plain_name(name: str) -> str:
    """A parameter's name in the model that PEFT was given."""
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer")


def _refuse_csx() -> None:
    if cstorch.use_cs():
        raise UserError(
            "Hugging Face models do not compile for a CSX: convert the checkpoint and train ModelZoo's model"
            " (docs/cerebras.md), or use the CPU backend."
        )
