"""LoRA layers that know their mask: the linear map, as a variant of `peft.tuners.lora.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ft.errors import UserError
from sparse_ft.lora.function import effective_weight, masked_linear, prune_, rank_one_factors
from sparse_ft.lora.rounding import noise_key
from sparse_ft.masks.mask_set import unpack_bits
from sparse_ft.models.hollow import is_hollow
from sparse_ft.settings.lora import AUTO
from sparse_ft.settings.modes import SPARSE_MODES, SPARSE_TO_SPARSE

__all__ = ["MaskedBase", "SparseLinearVariant", "SparseLoRALayer"]


class MaskedBase:
    """Mixin of PEFT layers: holds the mask of the base weight, and refuses to work without it.

    The bits lie in a non-persistent buffer: they follow the module to its device and stay out of every
    checkpoint; `attach_mask` brings them back after a reload.
    """

    sparse_mask: Tensor | None
    noise_name: str = ""
    lifted: bool = False  # whether the base works alone and as it is; see `sparse_ft.lora.whole`
    keep_effective: str = AUTO  # of the settings; see `sparse_ft.lora.keeping`
    keeps: bool = False  # whether the effective weight stays in memory from forward to backward

    def init_mask(self) -> None:
        """Declares the buffers; to be called once, after ``nn.Module.__init__``."""
        for name in ("sparse_mask", "mask_out", "mask_in"):
            self.register_buffer(name, None, persistent=False)

    @property
    def masked_parameter(self) -> nn.Parameter:
        """The base weight under the mask."""
        return self.get_base_layer().weight

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Makes the adapter's factors (PEFT), and remembers how its weights are rounded."""
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        self.__dict__.setdefault("_rounding", {})[adapter_name] = (config.rounding, config.rounding_seed)

    def rounding_key(self, adapter_name: str) -> int | None:
        """The key of the noise by which this adapter's weights are rounded; None: to the nearest."""
        rounding, seed = self._rounding[adapter_name]
        return noise_key(self.noise_name, seed) if rounding == "dithered" else None

    def attach_mask(self, packed: Tensor, name: str) -> None:
        """Takes the bits ``uint8 [..., ceil(C/8)]`` and zeroes the masked base weights, in place, where there are any.

        Args:
            packed: the bits.
            name: of the parameter in the plain model; the noise of dithered rounding belongs to it.

        Raises:
            ValueError: another mask is attached already.
        """
        weight = self.masked_parameter
        packed = packed.to(weight.device)
        if self.sparse_mask is not None and not torch.equal(self.sparse_mask, packed):
            raise ValueError("another mask is attached to this layer")
        if not is_hollow(weight):
            prune_(weight.data, packed)
        self.sparse_mask, self.noise_name = packed, name
        if weight.dim() == 2:
            factors = rank_one_factors(unpack_bits(packed, weight.shape[-1]))
            if factors is not None:
                self.mask_out, self.mask_in = (factor.to(weight.device) for factor in factors)

    def share_mask(self) -> None:
        """Makes the bits a parameter that is not trained: what shards parameters shards them with their weight."""
        packed = self.required_mask()
        del self.sparse_mask
        self.register_parameter("sparse_mask", nn.Parameter(packed, requires_grad=False))

    def required_mask(self) -> Tensor:
        """The attached bits.

        Raises:
            UserError: none are attached.
        """
        if self.sparse_mask is None:
            raise UserError("This sparse LoRA has no mask attached: load it with sparse_ft.lora.load_sparse_lora.")
        return self.sparse_mask

    @property
    def makes_effective(self) -> bool:
        """Whether a training step makes the effective weight."""
        adapter = self.single_adapter()
        return adapter is not None and self.is_masked(adapter)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """``A [..., r, in]`` and ``B [..., out, r]`` in their own dtype, as autograd follows them."""
        raise NotImplementedError

    def effective_weight(self, adapter_name: str, out: Tensor | None = None) -> Tensor:
        """``(W + s B A) . M`` of one adapter, in the dtype of ``W``: what forward uses and what merge writes.

        Args:
            adapter_name: which.
            out: takes the result; may be ``W``.
        """
        packed, scaling, key = self.required_mask(), self.scaling[adapter_name], self.rounding_key(adapter_name)
        return effective_weight(self.masked_parameter, *self.factors(adapter_name), packed, scaling, key, out)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Starts A and B as plain LoRA does; the modes' names are no initialisations of PEFT."""
        super().reset_lora_parameters(adapter_name, True if init_lora_weights in SPARSE_MODES else init_lora_weights)

    def single_adapter(self) -> str | None:
        """The active adapter of this layer.

        Raises:
            UserError: several; the mask of a sum of adapters is not the sum of two masked weights.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) > 1:
            raise UserError(f"Sparse LoRA works with one active adapter, these are active: {', '.join(names)}.")
        return names[0] if names else None


class SparseLinearVariant(LoraVariant):
    """``y = x ((W + s B A) . M)^T``, and a merge that is the same arithmetic."""

    def supports_lora_conversion(self) -> bool:
        return False  # (BA).M has full rank

    @staticmethod
    def init(module: SparseLoRALayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to prepare: the mask is attached once the whole model is wrapped."""

    @staticmethod
    def forward(
        module: SparseLoRALayer, active_adapter: str, x: Tensor, result: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The whole output (``result``, the base layer's own, is not needed)."""
        packed = module.required_mask()
        base = module.get_base_layer()
        factor_a, factor_b = module.factors(active_adapter)
        scaling, dropout = module.scaling[active_adapter], module.lora_dropout[active_adapter]
        if module.training and module.mask_out is not None:
            # (B A) . M = (m_out . B)(A . m_in): two thin products, no weight gradient. Only while training:
            # evaluation below uses the very weight that merge writes.
            low = F.linear(module._cast_input_dtype(dropout(x), factor_a.dtype), factor_a * module.mask_in)
            update = F.linear(low * scaling, factor_b * module.mask_out.unsqueeze(1))  # scaled while it is thin
            output = base(x)
            return (output + update).to(output.dtype)
        if module.training and isinstance(dropout, nn.Dropout):
            # Dropout touches the adapter's input alone, so W and the masked product need a pass each.
            factor_a, factor_b = factor_a.to(x.dtype), factor_b.to(x.dtype)
            return base(x) + masked_linear(dropout(x), None, factor_a, factor_b, packed, scaling, keep=module.keeps)
        key = module.rounding_key(active_adapter)
        return masked_linear(x, base.weight, factor_a, factor_b, packed, scaling, base.bias, key, module.keeps)

    @staticmethod
    def merge_safe(module: SparseLoRALayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        module.keep_base(orig_weight)
        return module.effective_weight(active_adapter)

    @staticmethod
    def merge_unsafe(module: SparseLoRALayer, active_adapter: str, orig_weight: nn.Parameter) -> None:
        module.keep_base(orig_weight.data)
        orig_weight.data = module.effective_weight(active_adapter)

    @staticmethod
    def unmerge(module: SparseLoRALayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return module._cache_pop("sparse_base")  # subtracting a rounded sum would not give W back


class SparseLoRALayer(MaskedBase, Linear):
    """A linear map with a low-rank update under a mask (or, in ``sparse_to_dense``, beside one)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.init_mask()

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, (SPARSE_TO_SPARSE.name,): SparseLinearVariant}

    def is_masked(self, adapter_name: str) -> bool:
        """Whether this adapter lives under the mask (``sparse_to_sparse``)."""
        return adapter_name in self.lora_variant

    @property
    def makes_effective(self) -> bool:
        return super().makes_effective and self.mask_out is None  # a structured mask takes two thin products

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s (B A) . M`` (``s B A`` in ``sparse_to_dense``), ``[out, in]``."""
        delta = super().get_delta_weight(adapter)
        return prune_(delta, self.required_mask()) if self.is_masked(adapter) else delta

    def keep_base(self, weight: Tensor) -> None:
        """Keeps W while an adapter is merged, so that unmerging gives back exactly W.

        Raises:
            UserError: an adapter is merged already.
        """
        if self.merged_adapters:
            raise UserError(f"Adapter {self.merged_adapters[0]} is merged already; unmerge it first.")
        self._cache_store("sparse_base", weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.required_mask()
        if self.lifted:
            return self.base_layer(x, *args, **kwargs)
        adapter = self.single_adapter()
        if self.disable_adapters or self.merged or adapter is None or not self.is_masked(adapter):
            return super().forward(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise UserError("Sparse LoRA does not mix adapters in one batch.")
        return self.lora_variant[adapter].forward(self, active_adapter=adapter, x=x)
