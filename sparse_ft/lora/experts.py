"""Sparse LoRA of fused experts: parameters ``[E, out, in]`` that are not the weight of a linear map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_ft.lora.function import masked_weight, prune_
from sparse_ft.lora.layer import MaskedBase
from sparse_ft.lora.remaking import Remade
from sparse_ft.settings.modes import MODES, SPARSE_TO_SPARSE

__all__ = ["ParamWrapper", "expert_factors"]


class _MaskedProxy(nn.Module):
    """Stands in for the parameter while the experts run: W -> ``(W + s B A) . M``."""

    def __init__(self, layer: ParamWrapper, adapter_name: str, remade: Remade | None) -> None:
        super().__init__()
        self.terms = layer.factors(adapter_name), layer.required_mask(), layer.scaling[adapter_name]
        self.key, self.remade = layer.rounding_key(adapter_name), remade

    def forward(self, weight: Tensor) -> Tensor:
        factors, packed, scaling = self.terms
        effective = masked_weight(weight, *factors, packed, scaling, self.key)
        return effective if self.remade is None else self.remade.watch(effective)


def expert_factors(layer: peft_layer.ParamWrapper, adapter_name: str) -> tuple[Tensor, Tensor]:
    """``A [E, r, in]`` and ``B [E, out, r]`` of PEFT's adapter on a parameter, in their own dtype, as views that
    autograd follows."""
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if layer.get_param().dim() == 2:
        return weight_a, weight_b
    factor_a = weight_a.reshape(layer.num_experts, -1, weight_a.shape[-1])
    factor_b = weight_b.reshape(weight_b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if not layer._did_swap_in_out_features:  # the parameter is [E, in, out]
        return factor_b.mT, factor_a.mT
    return factor_a, factor_b


class ParamWrapper(MaskedBase, peft_layer.ParamWrapper):
    """A parameter ``[E, out, in]`` (or ``[out, in]``) with a low-rank update an expert, under one mask.

    The class keeps PEFT's name because PEFT recognises nested wrappers by that string.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig,
                 **kwargs: Any) -> None:  # fmt: skip
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
        self.init_mask()
        self._under_mask = {adapter_name: MODES[config.sparse_mode].masked_update}

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None, (SPARSE_TO_SPARSE.name,): None}  # PEFT knows no variant classes for parameters

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if hasattr(self, "_under_mask"):  # a second adapter on a layer that exists
            self._under_mask[adapter_name] = MODES[config.sparse_mode].masked_update

    def is_masked(self, adapter_name: str) -> bool:
        """Whether this adapter lives under the mask (``sparse_to_sparse``)."""
        return self._under_mask[adapter_name]

    @property
    def masked_parameter(self) -> nn.Parameter:
        return self.get_param()

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return expert_factors(self, adapter_name)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """``s (B A) . M`` (``s B A`` in ``sparse_to_dense``), in the parameter's shape and dtype."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        return prune_(delta, self.required_mask()) if self.is_masked(adapter_name) else delta

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        self.required_mask()
        if self.lifted:
            yield
            return
        adapter = self.single_adapter()
        if adapter is None or not self.is_masked(adapter):
            with super()._activate_lora(active_adapters):
                yield
            return
        module, name = self.get_base_layer(), self.parameter_name
        trainable = self.get_param().requires_grad
        remade = None if self.keeps else Remade(lambda: self.effective_weight(adapter))
        proxy = _MaskedProxy(self, adapter, remade)
        # unsafe: without it torch runs the whole proxy once more, only to compare shapes.
        parametrize.register_parametrization(module, name, proxy, unsafe=True)
        module.parametrizations[name].original.requires_grad_(trainable)
        try:
            with parametrize.cached(), remade or nullcontext():
                yield
        finally:
            self._remove_parametrizations()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the effective weight into the parameter (``sparse_to_sparse``); else as PEFT does."""
        names = peft_layer.check_adapters_to_merge(self, adapter_names)
        masked = [name for name in names if name in self.lora_A and self.is_masked(name)]
        if not masked:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        if len(names) > 1 or self.merged_adapters:
            raise ValueError("sparse LoRA merges one adapter")
        parameter, merged = self.get_param(), self.effective_weight(masked[0])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"The merged weights are not finite; adapter {masked[0]} seems to be broken")
        self._cache_store("sparse_base", parameter.data)
        parameter.data = merged
        self.merged_adapters.append(masked[0])

    def unmerge(self) -> None:
        """Gives back exactly the base weight."""
        if self.merged_adapters and self.is_masked(self.merged_adapters[0]):
            self.get_param().data = self._cache_pop("sparse_base")
            self.merged_adapters.clear()
        else:
            super().unmerge()
