"""Callbacks for ModelZoo's Trainer: exact masks, also inside its LoRA.

ModelZoo finds callbacks by class name among the classes that exist when it reads a YAML;
`sparse_ft.cerebras.modelzoo.cszoo` imports this module first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from cerebras.modelzoo.common.utils.model.lora import LoRA_Embedding, LoRA_Linear
from cerebras.modelzoo.trainer.callbacks import Callback
from torch.nn import functional as F

from sparse_ft.cerebras.checkpoint import ModelZooMasks
from sparse_ft.cerebras.masked_lora import merged_weight
from sparse_ft.cerebras.modelzoo.sparsity import attach_masks
from sparse_ft.errors import UserError
from sparse_ft.masks.files import load_masks
from sparse_ft.settings.modes import MODES, SPARSE_TO_SPARSE

MaskedMode = Literal[tuple(name for name, mode in MODES.items() if mode.masked_base and mode.trains)]

__all__ = ["MaskedLoRALinear", "SparseMask", "SparseMaskCallback"]


class MaskedLoRALinear(LoRA_Linear):
    """ModelZoo's LoRA of a linear map with the update confined to the kept weights: ``W + where(M, s B A, 0)``.

    `SparseMaskCallback` gives existing `LoRA_Linear` modules this class; their parameters stay what they are. The
    mask is the buffer ``weight_mask`` that cerebras.pytorch's sparsity keeps beside the weight.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = merged_weight(self.weight, self.lora_A, self.lora_B, self.scaling, self.weight_mask)
        return F.linear(x, weight, bias=self.bias)


class _Prefixed(Mapping[str, torch.Tensor]):
    """Masks under the names they have in the trainer's module, still made one at a time."""

    def __init__(self, masks: Mapping[str, torch.Tensor], prefix: str):
        self._masks, self._prefix = masks, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masks[name.removeprefix(self._prefix)]

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._masks)

    def __len__(self) -> int:
        return len(self._masks)


class SparseMaskCallback(Callback):
    """Trains a ModelZoo model under the masks of a file.

    Replaces ModelZoo's ``sparsity`` where a LoRA is trained: together with ``Lora`` that one crashes at the first
    step, because the optimizer it makes sparse holds no sparse parameter, and it would leave the update unmasked.
    """

    def __init__(
        self,
        masks: str,
        hf_config: str,
        mode: MaskedMode = SPARSE_TO_SPARSE.name,
    ):
        """
        Args:
            masks: the mask file (any format of sparse_ft), by Hugging Face names.
            hf_config: ``config.json`` of the Hugging Face model; it tells heads and experts.
            mode: sparse_to_sparse (the LoRA's update is masked too), sparse_to_dense, or full (no LoRA).
        """
        self.masks = masks
        self.hf_config = hf_config
        self.mode = mode
        self._masks_updates = MODES[mode].lora and MODES[mode].masked_update
        self._sparsity = None

    def setup(self, trainer) -> None:
        """Applies the masks once model and optimizer exist.

        Raises:
            UserError: masks that do not fit, a LoRA that would merge without the mask or drops inputs, or a mode
                that does not go with the model.
        """
        mask_set = load_masks(self.masks)
        config = json.loads(Path(self.hf_config).read_text(encoding="utf-8"))
        by_name = ModelZooMasks(config, mask_set)
        prefixed = any(name.startswith("model.") for name, _ in trainer.model.named_parameters())
        masks = _Prefixed(by_name, "model." if prefixed else "")
        adapted = [module for module in trainer.model.modules() if isinstance(module, (LoRA_Linear, LoRA_Embedding))]
        self._check(adapted)
        self._sparsity = attach_masks(trainer.model, masks, trainer.optimizer)
        if self._masks_updates:
            for module in adapted:
                if not hasattr(module, "weight_mask"):
                    raise UserError("A LoRA sits on a weight without a mask; its merge would not be sparse.")
                module.__class__ = MaskedLoRALinear
        kept = "mask in every forward" if self._masks_updates and adapted else "mask on the weights"
        trainer.logger.info(
            f"SparseMask: {len(masks)} tensors, sparsity {mask_set.sparsity:.6f}, {kept}, masks {mask_set.checksum}"
        )

    def _check(self, adapted: list[torch.nn.Module]) -> None:
        if MODES[self.mode].lora != bool(adapted):
            raise UserError(
                f"SparseMask mode {self.mode} with {len(adapted)} LoRA modules: full trains without a LoRA."
            )
        if any(isinstance(module, LoRA_Embedding) for module in adapted):
            raise UserError("A LoRA on embeddings has no mask: restrict its target_modules to the decoder's layers.")
        for module in adapted:
            if module.merge_weights:
                raise UserError("lora_params.merge_weights must be false: ModelZoo's own merge is not masked.")
            if module.fan_in_fan_out:
                raise UserError("lora_params.fan_in_fan_out must be false under a mask.")
            if self._masks_updates and isinstance(module.lora_dropout, torch.nn.Dropout):
                raise UserError(
                    "lora_params.dropout must be 0 in mode sparse_to_sparse: the update is part of the weight."
                )

    def on_load_checkpoint(self, trainer, state_dict: dict) -> None:
        """Checks that the checkpoint's masks, which ModelZoo loads over ours, are ours.

        Raises:
            UserError: another mask.
        """
        ours = ModelZooMasks(json.loads(Path(self.hf_config).read_text(encoding="utf-8")), load_masks(self.masks))
        for name, tensor in state_dict.get("model", {}).items():
            plain = name.removeprefix("model.").removesuffix("_mask")
            if name.endswith("_mask") and plain in ours and not torch.equal(tensor.to(torch.bool).cpu(), ours[plain]):
                raise UserError(f"The checkpoint was made with another mask of {plain} than {self.masks}.")

    def on_save_trainer_state(self, trainer, state_dict: dict) -> None:
        """Nothing to keep: the masks are in the model's state."""

    def on_load_trainer_state(self, trainer, state_dict: dict) -> None:
        """Nothing was kept."""


class SparseMask(SparseMaskCallback):
    """The name under which a YAML lists `SparseMaskCallback`."""
