"""The parameters of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_ft.settings import shared
from sparse_ft.settings.field import Settings, setting

__all__ = ["SCHEDULES", "TrainingSettings"]

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """How to train. ``rounding`` is that of weights which train in bfloat16 or float16 themselves (mode full)."""

    learning_rate: float = setting(2e-4, "peak of the schedule.", time=False)
    max_steps: int = setting(100, "optimizer steps.", least=1)
    num_epochs: float | None = setting(
        None, "passes over the training rows, in the place of max_steps; or none.", later=True
    )
    schedule: str = setting(
        "linear",
        "the learning rate after the warmup: linear or cosine (both to 0), or constant.",
        choices=SCHEDULES,
        time=False,
        later=True,
    )
    batch_size: int = setting(8, "sequences per device and accumulation step.", least=1)
    gradient_accumulation: int = setting(1, "batches per optimizer step.", least=1)
    warmup_fraction: float = setting(0.1, "part of the steps in which the learning rate rises.", time=False)
    weight_decay: float = setting(0.0, "of AdamW.", time=False)
    max_grad_norm: float = setting(1.0, "longest gradient; a longer one is scaled down.", flag=False)
    gradient_checkpointing: str | None = setting(
        None, "recompute activations in the backward pass.", choices=("reentrant", "non_reentrant")
    )
    rounding: str = shared.rounding()
    seed: int = shared.seed()

    @property
    def examples_needed(self) -> int | None:
        """Examples that ``max_steps`` steps consume on one device; None: ``num_epochs`` passes over all there are."""
        if self.num_epochs is not None:
            return None
        return self.max_steps * self.batch_size * self.gradient_accumulation

    def steps_over(self, examples: int) -> int:
        """Optimizer steps of a training on so many examples. A pass ends with a smaller batch, if need be."""
        if self.num_epochs is None:
            return self.max_steps
        batches = math.ceil(examples / self.batch_size)
        return math.ceil(self.num_epochs * math.ceil(batches / self.gradient_accumulation))

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        if not 0 < self.learning_rate < 10:
            yield f"learning_rate is {self.learning_rate}; it must be above 0 (typical: 1e-4 to 5e-4)."
        if self.num_epochs is not None and not 0 < self.num_epochs < math.inf:
            yield f"num_epochs is {self.num_epochs}; it must be above 0, or none."
        if not 0 <= self.warmup_fraction < 1:
            yield f"warmup_fraction is {self.warmup_fraction}; it must lie in [0, 1)."
        if not 0 <= self.weight_decay < math.inf:
            yield f"weight_decay is {self.weight_decay}; it must be 0 or more."
