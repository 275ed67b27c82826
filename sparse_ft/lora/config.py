"""What a sparse LoRA is made with: settings that need no PEFT to be read and checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.lora.rounding import ROUNDINGS
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import projection_names
from sparse_ft.settings.modes import MODES

__all__ = ["SPARSE_MODES", "LoraSettings", "chosen_projections"]

SPARSE_MODES = tuple(name for name, mode in MODES.items() if mode.lora and mode.masked_base)


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scaling and places of an adapter.

    Attributes:
        r: rank of the factors.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input of the adapter while training. Experts take none.
        target_modules: projections to adapt, by the names in the family's row (Mixtral's experts have ``w1``, ``w2``
            and ``w3``); None adapts every prunable projection.
        rounding: of ``W + s B A`` to bfloat16 or float16, in the sparse forward and in every merge: ``dithered``,
            which keeps small updates in the mean, or ``nearest``. Without effect in float32.

    Raises:
        UserError: naming each of a rank or alpha that is not positive, a dropout outside [0, 1), an unknown rounding.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    rounding: str = "dithered"

    def __post_init__(self) -> None:
        problems = []
        if self.r < 1:
            problems.append(f"lora_r is {self.r}: the rank of an adapter is 1 or more.")
        if not 0 < self.alpha < math.inf:
            problems.append(f"lora_alpha is {self.alpha}: it must be positive.")
        if not 0 <= self.dropout < 1:
            problems.append(f"lora_dropout is {self.dropout}: it lies in [0, 1).")
        if self.rounding not in ROUNDINGS:
            problems.append(f"rounding is '{self.rounding}', it must be one of {', '.join(ROUNDINGS)}.")
        if problems:
            raise UserError(" ".join(problems))
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))


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
    if settings.dropout and targets & set().union(*stacks):
        every = ", ".join(sorted(set().union(*stacks)))
        raise UserError(f"lora_dropout must be 0 on experts ({every}): their input is not at hand to drop.")
    return targets
