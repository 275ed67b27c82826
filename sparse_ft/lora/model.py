"""Sparse LoRA on a whole model: put it on, load it, merge it, check it.

The modes:
    dense              plain PEFT LoRA on the unpruned model.
    sparse_to_dense    base W.M frozen, dense adapter: y = x (W.M)^T + s x (B A)^T.
    sparse_to_sparse   y = x ((W + s B A) . M)^T in every forward; merged, it is sparse by construction.
    full               every parameter trains, masked weights excepted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.errors import UserError
from sparse_ft.lora.full import hold_masked_weights
from sparse_ft.lora.keeping import set_keeping
from sparse_ft.lora.layer import MaskedBase
from sparse_ft.lora.merge import adapted_layers, refuse_shared
from sparse_ft.lora.peft_config import SparseLoRAConfig
from sparse_ft.lora.projections import peft_targets
from sparse_ft.masks.mask_set import MaskSet, packed_shape
from sparse_ft.models.loading import apply_masks, prunable_shapes
from sparse_ft.models.names import slots
from sparse_ft.settings.lora import AUTO, LoraSettings
from sparse_ft.settings.modes import DENSE, MODES, SPARSE_TO_SPARSE, TRAINED_MODES

__all__ = [
    "apply_sparse_lora",
    "attach_masks",
    "load_sparse_lora",
    "remask",
    "validate_sparsity_preserved",
]


def apply_sparse_lora(
    model: PreTrainedModel,
    settings: LoraSettings | LoraConfig | None = None,
    mode: str = SPARSE_TO_SPARSE.name,
    masks: MaskSet | None = None,
    seed: int = 0,
) -> PeftModel | PreTrainedModel:
    """Prepares ``model``, in place, for fine-tuning in one of the four modes.

    Args:
        model: a plain model of a supported family, pruned already or not: masked weights are set to zero.
        settings: rank, alpha, dropout and target modules; a PEFT configuration is taken as it is (of a
            `SparseLoRAConfig` the mask's checksum is filled in), with ``keep_effective`` auto. Unused in mode ``full``.
        mode: dense, sparse_to_dense, sparse_to_sparse or full.
        masks: required by the sparse modes; ``full`` also works without (plain fine-tuning).
        seed: of the dithered rounding of a sparse adapter made from `LoraSettings`.

    Returns:
        the `PeftModel`, or in mode ``full`` the model itself.

    Raises:
        UserError: masks that do not fit, are missing or are not wanted; a model with adapters; unknown
            modes or target modules; dropout on experts; an adapter on a weight that is shared (a tied head).
    """
    if mode not in TRAINED_MODES:
        raise UserError(f"mode is '{mode}', it must be one of {', '.join(TRAINED_MODES)}.")
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise UserError("The model carries adapters already; merge them first (merge_all_lora_weights).")
    kind = MODES[mode]
    if masks is not None and not kind.masked_base:
        others = ", ".join(name for name in TRAINED_MODES if MODES[name].masked_base)
        raise UserError(f"Mode {mode} takes no masks; choose one of {others}.")
    if masks is None and kind.masked_base and kind.lora:
        raise UserError(f"Mode {mode} needs masks; make them with compute_masks.")
    if not kind.lora:
        return hold_masked_weights(model, masks)
    config = _peft_config(model, settings or LoraSettings(), mode, masks, seed)
    refuse_shared(model, config)
    if masks is not None:
        apply_masks(model, masks)  # checks that they fit, before the model is changed
    with _without_false_alarms():
        model = get_peft_model(model, config)
    set_keeping(model, getattr(settings, "keep_effective", AUTO))
    return model if masks is None else attach_masks(model, masks)


def attach_masks(model: PeftModel, masks: MaskSet) -> PeftModel:
    """Gives the layers of a sparse LoRA their masks (after loading by PEFT); again is harmless.

    Raises:
        UserError: not the masks the adapter was trained with, or no sparse LoRA.
    """
    for name, config in model.peft_config.items():
        expected = getattr(config, "mask_checksum", None)
        if expected is None:
            raise UserError(f"Adapter {name} is no sparse LoRA: it was made without a mask.")
        if expected != masks.checksum:
            raise UserError(
                f"Adapter {name} belongs to the masks {expected[:12]}, these are {masks.checksum[:12]}:"
                " use the mask file that it was trained with."
            )
    layers = dict(_masked_layers(model))
    for parameter, packed in _packed_parameters(model.get_base_model(), masks, set(layers)):
        layers[parameter].attach_mask(packed, parameter)
    # The bits never change: let DistributedDataParallel not send them round before every step.
    ignored = [
        name for name, _ in model.named_buffers() if name.rpartition(".")[2].startswith(("sparse_mask", "mask_"))
    ]
    model._ddp_params_and_buffers_to_ignore = ignored
    return model


def load_sparse_lora(model: PreTrainedModel, folder: str | Path, masks: MaskSet, trainable: bool = False) -> PeftModel:
    """Puts a saved sparse LoRA on its base model.

    Args:
        model: the base model, pruned or not; its masked weights are set to zero, in place.
        folder: what ``save_pretrained`` wrote.
        masks: the masks it was trained with.
        trainable: whether training goes on.

    Raises:
        UserError: no adapter there, another kind of adapter, or other masks.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter (adapter_config.json is missing).")
    config = SparseLoRAConfig.from_pretrained(str(folder))
    if config.mask_checksum != masks.checksum:
        raise UserError(
            f"{folder} belongs to the masks {str(config.mask_checksum)[:12]}, these are {masks.checksum[:12]}:"
            " use the mask file that it was trained with."
        )
    apply_masks(model, masks)
    with _without_false_alarms():
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    return attach_masks(model, masks)


@torch.no_grad()
def remask(model: PreTrainedModel, masks: MaskSet) -> None:
    """Sets the masked weights of a merged model to zero, in place: ``(W + s B A) . M`` after a dense adapter.

    Raises:
        UserError: masks that do not fit, or adapters not merged yet.
    """
    if isinstance(model, PeftModel):
        raise UserError("Merge the adapters before re-masking (merge_all_lora_weights).")
    apply_masks(model, masks)


@torch.no_grad()
def validate_sparsity_preserved(
    model: PreTrainedModel | PeftModel, masks: MaskSet, tolerance: float = 0.0
) -> dict[str, int]:
    """Counts masked weights that are not zero in a model in memory, by checkpoint tensor name.

    An unmerged sparse LoRA is judged by the weights its forward pass uses. For a checkpoint on disk there is
    `sparse_ft.validation.validate_checkpoint`.

    Args:
        tolerance: largest magnitude that counts as zero. NaN never does.

    Returns:
        violations of each tensor that has any; empty when the sparsity is preserved.

    Raises:
        UserError: masks that do not fit.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted = dict(_masked_layers(model)) if isinstance(model, PeftModel) else {}
    violations: dict[str, int] = {}
    for name, slot in slots(plain.config.to_dict(), masks).items():
        layer = adapted.get(slot.parameter)
        weight = _weight_in_use(layer) if layer is not None else plain.get_parameter(slot.parameter)
        part = slot.view(weight)
        if tuple(part.shape) != masks.shapes[name]:
            raise UserError(f"The mask of {name} has shape {masks.shapes[name]}, the weight {tuple(part.shape)}.")
        wrong = ~(part.abs() <= tolerance) & ~masks[name].to(part.device)
        if count := int(wrong.sum()):
            violations[name] = count
    return violations


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """PEFT looks for its own pattern of the fused experts among modules only, and warns that it found none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def _weight_in_use(layer: MaskedBase) -> Tensor:
    adapter = layer.single_adapter()
    if layer.merged or layer.disable_adapters or adapter is None:
        return layer.masked_parameter
    if layer.is_masked(adapter):
        return layer.effective_weight(adapter)
    return layer.masked_parameter + layer.get_delta_weight(adapter)


def _peft_config(
    model: PreTrainedModel, settings: LoraSettings | LoraConfig, mode: str, masks: MaskSet | None, seed: int
) -> LoraConfig:
    if isinstance(settings, LoraConfig):
        given = getattr(settings, "sparse_mode", DENSE.name)
        if given != mode:
            raise UserError(f"The configuration is one of mode {given}, but mode is {mode}.")
        if masks is not None:
            if settings.mask_checksum not in (None, masks.checksum):
                raise UserError(f"The configuration belongs to the masks {settings.mask_checksum[:12]}, not to these.")
            settings.mask_checksum = masks.checksum
        return settings
    settings.check()
    values, names = model.config.to_dict(), prunable_shapes(model, fused=True)
    common = {
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.rslora,
        **peft_targets(settings, values, names),
        "task_type": TaskType.CAUSAL_LM,
    }
    if masks is None:
        return LoraConfig(**common)
    rounding = {"rounding": settings.rounding, "rounding_seed": seed}
    return SparseLoRAConfig(**common, **rounding, sparse_mode=mode, mask_checksum=masks.checksum)


def _masked_layers(model: PeftModel) -> Iterator[tuple[str, MaskedBase]]:
    """The sparse layers by the name of the parameter they adapt, in the plain model."""
    return ((name, layer) for name, layer in adapted_layers(model) if isinstance(layer, MaskedBase))


def _packed_parameters(plain: nn.Module, masks: MaskSet, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """``parameter name, packed bits``, those of single experts put together; memory of one parameter."""
    parts: dict[str, list] = {}
    for name, slot in slots(plain.config.to_dict(), masks).items():
        parts.setdefault(slot.parameter, []).append((slot, masks.packed[name]))
    if foreign := sorted(wanted - set(parts)):
        raise UserError(f"The masks have none for {foreign[0]}, which the adapter changes.")
    for parameter in sorted(wanted):
        slot, packed = parts[parameter][0]
        if slot.index:
            layer = plain.get_submodule(parameter.rpartition(".")[0])
            shape = layer.get_base_layer().get_parameter(parameter.rpartition(".")[2]).shape
            packed = torch.zeros(packed_shape(tuple(shape)), dtype=torch.uint8)
            for slot, bits in parts[parameter]:
                slot.view(packed).copy_(bits)
        yield parameter, packed
