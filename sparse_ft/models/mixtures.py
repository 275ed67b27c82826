"""Masks of mixtures: the same masks by other names, and those of the model that has only the experts that are left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import has_fused_experts, parameter_masks, role, slots

__all__ = ["kept_experts", "name_without", "refitted", "without_experts"]


def refitted(config: Mapping[str, Any], masks: MaskSet, shapes: Mapping[str, tuple[int, ...]]) -> MaskSet:
    """Masks by the names that a checkpoint has.

    Masks of experts in one tensor fit experts one by one; masks of more experts fit the checkpoint from which those are
    gone of which they keep no weight.

    Args:
        config: of the checkpoint; shapes: of its prunable tensors.

    Returns:
        other masks with the same metadata; ``masks`` themselves where they fit, or no way to is known.
    """
    if set(masks) == set(shapes):
        return masks
    try:
        here = slots(config, shapes)
        if {slot.parameter for slot in slots(config, masks).values()} != {slot.parameter for slot in here.values()}:
            return masks
        if not has_fused_experts(config, masks):
            return without_experts(config, masks)
        fused = parameter_masks(config, masks)
        return MaskSet.from_bool({n: slot.view(fused[slot.parameter]) for n, slot in here.items()}, masks.metadata)
    except (ValueError, IndexError, RuntimeError):  # names or shapes of another architecture
        return masks


def kept_experts(config: Mapping[str, Any], masks: MaskSet) -> dict[int, list[int]]:
    """The experts of every mixture of which any weight is kept, by block.

    Args:
        config: of any model of the family; masks: that list experts one by one.
    """
    kept: dict[int, set[int]] = {}
    for name in masks:
        what = role(config, name)
        if what.expert is not None:
            kept.setdefault(what.block, set()).update([what.expert] if masks.kept(name) else [])
    return {block: sorted(experts) for block, experts in kept.items()}


def name_without(config: Mapping[str, Any], name: str, kept: Mapping[int, Iterable[int]]) -> str | None:
    """The name of a prunable tensor in the model that has only the experts ``kept``; None: it is gone.

    Args:
        kept: by block; a block that is not there keeps all.
    """
    what = role(config, name)
    if what.expert is None or what.block not in kept:
        return name
    experts = list(kept[what.block])
    if what.expert not in experts:
        return None
    home = f"{architecture_of(config).experts.stored}.experts"
    return name.replace(f".{home}.{what.expert}.", f".{home}.{experts.index(what.expert)}.")


def without_experts(config: Mapping[str, Any], masks: MaskSet) -> MaskSet:
    """The masks of the model from which the experts are gone of which ``masks`` keep no weight."""
    kept = kept_experts(config, masks)
    names = {name: new for name in masks if (new := name_without(config, name, kept)) is not None}
    packed = {new: masks.bits[name] for name, new in names.items()}
    return MaskSet(packed, {new: masks.shapes[name] for name, new in names.items()}, masks.metadata)
