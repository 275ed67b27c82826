"""The projections of a model that an adapter changes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import projection_names, role
from sparse_ft.settings.lora import LoraSettings

__all__ = ["chosen_projections", "peft_targets"]


def chosen_projections(settings: LoraSettings, config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """The projections that an adapter changes, of those that a model has.

    Args:
        config: the model's configuration; names: of its prunable tensors.

    Raises:
        UserError: one that the model has not, one of experts without the other in its parameter, dropout on experts.
    """
    projections, experts = projection_names(config, names), architecture_of(config).experts
    targets = set(projections if settings.target_modules is None else settings.target_modules)
    if unknown := sorted(targets - set(projections)):
        raise UserError(f"lora target_modules {', '.join(unknown)}: this model has {', '.join(sorted(projections))}.")
    stacks = [set(matrix.singles) for matrix in experts.matrices] if experts is not None else []
    for stack in stacks:
        if 0 < len(targets & stack) < len(stack):
            both = " and ".join(sorted(stack))
            raise UserError(f"Adapt the expert projections {both} together: they are one parameter of the model.")
    if settings.lora_dropout and targets & set().union(*stacks):
        every = ", ".join(sorted(set().union(*stacks)))
        raise UserError(f"lora_dropout must be 0 on experts ({every}): their input is not at hand to drop.")
    return targets


def peft_targets(settings: LoraSettings, config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The fields of a `peft.LoraConfig` that say what it changes.

    PEFT takes the names that checkpoints give to experts for the 3-D parameters that transformers holds them in. Where
    experts and other MLPs of a model share these names (``gate_proj``), it would adapt the experts alone, or, of a
    family whose experts it does not know, the others alone: so every parameter is named, that of a linear map too. It
    also scales a fused pair by alpha / rank, whatever ``rslora`` says, which naming it puts right.

    Args:
        config: the model's configuration; names: of its prunable tensors, experts in one.

    Raises:
        UserError: as `chosen_projections`.
    """
    targets, experts = chosen_projections(settings, config, names), architecture_of(config).experts
    singles = {single for matrix in experts.matrices for single in matrix.singles} if experts is not None else set()
    shared = experts is not None and singles & {map_.name for map_ in experts.shared + experts.dense}
    if not shared and not (singles and settings.rslora):
        return {"target_modules": sorted(targets)}
    parameters, ranks, alphas = set(), {}, {}
    for what in (role(config, name) for name in names):
        if not what.is_adapted(targets) or not set(what.map.adapter_names) <= singles:
            continue
        parameters.add(f"experts.{what.map.path}" if what.fused_experts else f"{what.map.path}.weight")
        if (parts := len(what.map.adapter_names)) > 1:  # each part of a fused matrix has the rank that was asked for
            pattern = rf".*\.{re.escape(what.map.path)}"
            # and the scaling too: alpha / rank, or alpha / its root
            ranks[pattern] = parts * settings.lora_r
            alphas[pattern] = (math.sqrt(parts) if settings.rslora else parts) * settings.lora_alpha
    return {
        "target_modules": sorted(targets - singles),
        "target_parameters": sorted(parameters),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
