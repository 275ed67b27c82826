"""The PEFT configuration of an adapter on a pruned model, which refuses to be read as another one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from torch import nn

from sparse_ft.errors import UserError
from sparse_ft.lora.experts import ParamWrapper
from sparse_ft.lora.layer import SparseLoRALayer
from sparse_ft.settings.modes import SPARSE_MODES, SPARSE_TO_SPARSE
from sparse_ft.settings.shared import ROUNDINGS

__all__ = ["SparseLoRAConfig"]


@dataclass
class SparseLoRAConfig(LoraConfig):
    """A `peft.LoraConfig` for an adapter on a pruned model.

    ``init_lora_weights`` carries the mode's name. That is the field by which PEFT chooses a variant, and it
    keeps the promise on reload: stock PEFT reads any adapter of type LORA as `LoraConfig` and drops the
    fields it does not know, but it refuses an initialisation it does not know. So an adapter trained under a
    mask never comes back as a dense one.

    Attributes:
        sparse_mode: ``sparse_to_sparse`` (mask inside every forward) or ``sparse_to_dense``.
        mask_checksum: identity of the mask set (SHA-256, hex) the adapter belongs to.
        rounding: of the sum in bfloat16 or float16: ``dithered`` or ``nearest``. An adapter that was saved before
            there was a choice is one of ``nearest``.
        rounding_seed: of the dithered rounding's noise.

    Raises:
        UserError: another mode, or an option that has no meaning under a mask.
    """

    sparse_mode: str = field(
        default=SPARSE_TO_SPARSE.name,
        metadata={"help": "sparse_to_sparse: y = ((W + sBA).M)x; sparse_to_dense: y = (W.M)x + sBAx"},
    )
    mask_checksum: str | None = field(
        default=None, metadata={"help": "SHA-256 of the mask set that the adapter was trained with"}
    )
    rounding: str = field(default="dithered", metadata={"help": "of W + sBA in bfloat16 or float16"})
    rounding_seed: int = field(default=0, metadata={"help": "of the noise of dithered rounding"})
    init_lora_weights: Any = field(
        default=True,
        metadata={
            "help": "Set by sparse_mode; A and B start as in plain LoRA (B is zero).",
            "lora_variants": ["mica", SPARSE_TO_SPARSE.name],
        },
    )

    def __post_init__(self) -> None:
        if self.sparse_mode not in SPARSE_MODES:
            raise UserError(f"sparse_mode is '{self.sparse_mode}', it must be one of {', '.join(SPARSE_MODES)}.")
        if self.rounding not in ROUNDINGS:
            raise UserError(f"rounding is '{self.rounding}', it must be one of {', '.join(ROUNDINGS)}.")
        if self.init_lora_weights not in (True, self.sparse_mode):
            raise UserError(f"init_lora_weights={self.init_lora_weights!r} cannot be combined with a mask.")
        for option in ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save"):
            if getattr(self, option):
                raise UserError(f"{option} cannot be combined with sparse LoRA: the merge would not be exact.")
        self.init_lora_weights = self.sparse_mode
        super().__post_init__()
        self._register_custom_module({nn.Module: _sparse_layer})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> SparseLoRAConfig:
        """The configuration from saved fields (PEFT calls this when it reads ``adapter_config.json``).

        Raises:
            UserError: the fields are those of another kind of adapter, or of a newer version.
        """
        if kwargs.get("sparse_mode") not in SPARSE_MODES:
            raise UserError("adapter_config.json describes no sparse LoRA: it has no sparse_mode. Load it with peft.")
        unknown = sorted(set(kwargs) - {entry.name for entry in fields(cls)})
        if unknown:
            raise UserError(f"adapter_config.json has fields this version does not know: {', '.join(unknown)}.")
        return cls(**{"rounding": "nearest", **kwargs})  # what was saved without one was made without dither


def _sparse_layer(
    target: nn.Module, adapter_name: str, config: SparseLoRAConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module:
    """The layer that PEFT puts in the place of ``target``: for a linear map, or for a parameter of a module.

    Raises:
        UserError: a module that is no linear map (an embedding, say).
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    if not isinstance(base, nn.Linear):
        raise UserError(f"Sparse LoRA cannot adapt a {type(base).__name__}; choose linear maps as target_modules.")
    return SparseLoRALayer(target, adapter_name, config=config, **kwargs)
