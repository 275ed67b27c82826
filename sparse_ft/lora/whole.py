"""One copy of the weights for two models: the pruned one under an adapter, and, the masks lifted, the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.lora.function import pruned_linear
from sparse_ft.lora.layer import MaskedBase, SparseLoRALayer
from sparse_ft.lora.merge import adapted_layers
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_tensors_into
from sparse_ft.models.names import slots

__all__ = ["Lifted", "WholeLinear", "whole_base"]


class WholeLinear(nn.Linear):
    """A linear map whose frozen weight is whole: its mask is applied at each use, unless it is lifted.

    An ``nn.Linear`` becomes one, and is one no more, by its class: the parameters stay where they are.

    Attributes:
        kept: the bits of the mask, ``uint8 [out, ceil(in/8)]``.
        lifted: whether the weight is used as it is.
    """

    kept: Tensor
    lifted: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.lifted:
            return super().forward(x)
        return pruned_linear(x, self.weight, self.kept, self.bias)


class Lifted:
    """The dense model inside a pruned one; called as the dense model is.

    Args:
        model: with a sparse adapter, over a base that is whole.
        maps: those that mask their weight themselves.
    """

    def __init__(self, model: PeftModel, maps: list[WholeLinear]):
        self._model = model
        self._masked = [*maps, *(layer for _, layer in adapted_layers(model))]

    def get_base_model(self) -> PreTrainedModel:
        """The model whose blocks are run."""
        return self._model.get_base_model()

    def __call__(self, **inputs: Any) -> Any:
        """The dense model's output in eval mode, bit for bit: masks lifted, adapters off; then all is as before."""
        training = self._model.training
        try:
            self._set(True)
            self._model.eval()
            return self.get_base_model()(**inputs)
        finally:
            self._set(False)
            self._model.train(training)

    def _set(self, lifted: bool) -> None:
        for part in self._masked:
            part.lifted = lifted


@contextmanager
def whole_base(model: PeftModel, masks: MaskSet, dense: Checkpoint) -> Iterator[Lifted | None]:
    """The base under a sparse adapter has all its weights inside the block, and is pruned again, in place, at its end.

    What is trained inside is the same to the bit: where the adapter's own arithmetic masks a weight nothing is added
    to it, and the other linear maps mask theirs at each use, which takes memory for one of them at a time.

    Args:
        model: under ``masks``, as `sparse_ft.lora.model.apply_sparse_lora` makes it.
        masks: of the base.
        dense: what the base was before it was pruned.

    Yields:
        the dense model; None where the weights of a module that is no linear map (experts beside a dense adapter, or
        without one) would have to be masked: nothing was changed then.
    """
    maps = _linear_maps(model, masks)
    if maps is None:
        yield None
        return
    plain = model.get_base_model()
    weights = {name.replace(".base_layer", ""): parameter for name, parameter in plain.named_parameters()}
    load_tensors_into(weights, dense, masks)
    for module, bits in maps.items():
        module.__class__ = WholeLinear
        module.lifted = False
        module.register_buffer("kept", bits.to(module.weight.device), persistent=False)
    try:
        yield Lifted(model, list(maps))
    finally:
        for module in maps:
            del module.kept, module.lifted
            module.__class__ = nn.Linear
        _prune(plain, weights, masks)


@torch.no_grad()
def _prune(plain: PreTrainedModel, weights: Mapping[str, Tensor], masks: MaskSet) -> None:
    for name, slot in slots(plain.config.to_dict(), masks).items():
        part = slot.view(weights[slot.parameter])
        part.masked_fill_(~masks[name].to(part.device), 0)


def _linear_maps(model: PeftModel, masks: MaskSet) -> dict[nn.Linear, Tensor] | None:
    """The linear maps that have to mask their weight, and the bits; None where another module would have to.

    The weight of a parameter's adapter under the mask is masked where it is made.
    """
    plain, adapted = model.get_base_model(), dict(adapted_layers(model))
    found: dict[nn.Linear, Tensor] = {}
    for name, slot in slots(plain.config.to_dict(), masks).items():
        layer = adapted.get(slot.parameter)
        if isinstance(layer, SparseLoRALayer):
            module, bits = layer.get_base_layer(), layer.required_mask()
        elif isinstance(layer, MaskedBase) and layer.is_masked(layer.single_adapter()):
            continue
        else:
            module, bits = plain.get_submodule(slot.parameter.rpartition(".")[0]), masks.packed[name]
        if type(module) is not nn.Linear or slot.index:
            return None
        found[module] = bits
    return found
