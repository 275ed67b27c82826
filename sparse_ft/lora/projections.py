"""The projections of a model that an adapter changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import projection_names
from sparse_ft.settings.lora import LoraSettings

__all__ = ["chosen_projections"]


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
