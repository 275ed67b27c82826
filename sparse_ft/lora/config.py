"""What a sparse LoRA is made with: settings that need no PEFT to be read and checked."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from sparse_ft.errors import UserError
from sparse_ft.lora.rounding import ROUNDINGS
from sparse_ft.settings.modes import MODES

__all__ = ["SPARSE_MODES", "LoraSettings", "chosen_projections"]

SPARSE_MODES = tuple(name for name, mode in MODES.items() if mode.lora and mode.masked_base)


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scaling and places of an adapter.

    Attributes:
        r: rank of the factors.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input of the adapter while training. Experts (Mixtral) take none.
        target_modules: projections to adapt (``q_proj`` ... ``down_proj``, ``w1`` ``w2`` ``w3`` for experts);
            None adapts every prunable projection.
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


def chosen_projections(settings: LoraSettings, projections: Collection[str]) -> set[str]:
    """The projections that an adapter changes, of those that a model has (experts as w1, w2, w3).

    Raises:
        UserError: one that the model has not, w1 without w3, or dropout on experts.
    """
    targets = set(projections if settings.target_modules is None else settings.target_modules)
    if unknown := sorted(targets - set(projections)):
        raise UserError(f"lora target_modules {', '.join(unknown)}: this model has {', '.join(sorted(projections))}.")
    if len(targets & {"w1", "w3"}) == 1:
        raise UserError("Adapt the expert projections w1 and w3 together: they are one parameter of the model.")
    if settings.dropout and targets & {"w1", "w2", "w3"}:
        raise UserError("lora_dropout must be 0 on experts (w1, w2, w3): their input is not at hand to drop.")
    return targets
