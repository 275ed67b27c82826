"""What a training gave and cost, measured while it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import TrainerCallback

from sparse_ft.progress import Progress
from sparse_ft.settings.training import TrainingSettings

__all__ = ["NonFiniteLossError", "Report", "TrainingResult", "Watch"]

Report = Callable[[int, Mapping[str, float]], None]


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""

    failure_class = "non_finite_loss"  # see `sparse_ft.cell.failures.classify`


@dataclass
class TrainingResult:
    """What training gave and cost. What could not be measured is None.

    ``loss`` is the mean over the last tenth of the steps; ``loss_curve`` holds (step, loss), ``parts`` the same of each
    part of a distillation's loss. Throughput counts non-padding tokens and leaves out the first
    ``warmup_steps_untimed`` steps.
    """

    loss: float | None
    loss_curve: list[tuple[int, float]]
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    samples_per_second: float | None
    warmup_steps_untimed: int
    peak_bytes: int
    protocol: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


class Watch(TrainerCallback):
    """Reports progress and what every step gave, keeps the curves and the clock, stops at a loss that is not finite.

    Args:
        settings: of the training.
        progress: told of every step.
        report: takes the number of a step with its ``loss``, ``learning_rate``, ``grad_norm``, ``tokens_per_second``
            and the parts of the loss.
        parts: what the parts were, batch by batch, by name; it grows while the training goes on.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        progress: Progress,
        report: Report = lambda step, values: None,
        parts: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ):
        self._progress, self._report, self._batches = progress, report, parts
        self._parts: dict[str, list[tuple[int, float]]] = {}
        self._counted: dict[str, int] = {}  # batches of each part that are in its curve
        # The first steps pay for allocations and compilation; a two-step run has only the second to show.
        self._untimed = min(2, settings.max_steps - 1)
        self._batch = settings.batch_size * settings.gradient_accumulation
        self._curve: list[tuple[int, float]] = []
        self._marks: list[tuple[float, int]] = []  # (clock, tokens seen) at the start and after each step

    def on_train_begin(self, args, state, control, **kwargs):
        self._marks = [(time.perf_counter(), state.num_input_tokens_seen)]
        self._went_on = time.perf_counter()
        self._first_step = state.global_step
        self._processes = args.world_size

    def on_step_end(self, args, state, control, **kwargs):
        self._marks.append((time.perf_counter(), state.num_input_tokens_seen))

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        loss = float(loss)
        self._curve.append((state.global_step, loss))
        values = {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
        self._report(
            state.global_step, {"loss": loss, **values, **self._rate(), **self._latest_parts(state.global_step)}
        )
        self._progress.advance(1, note=f"loss {loss:.4f}")
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the training loss is {loss} at step {state.global_step}")
        self._went_on = time.perf_counter()

    def _rate(self) -> dict[str, float]:
        """Tokens a second of the latest step, without what others did after the one before (a search scores there)."""
        (_, before), (ended, tokens) = self._marks[-2:]
        seconds = ended - self._went_on
        return {"tokens_per_second": (tokens - before) / seconds} if seconds > 0 else {}

    def _latest_parts(self, step: int) -> dict[str, float]:
        """Each part's mean over the batches of a step."""
        found = {}
        for name, values in self._batches.items():
            some = values[self._counted.get(name, 0) :]
            self._counted[name] = len(values)
            found[name] = sum(some) / len(some)
            self._parts.setdefault(name, []).append((step, found[name]))
        return found

    def result(self, peak: int, protocol: dict[str, Any]) -> TrainingResult:
        steps = len(self._marks) - 1
        (began, tokens_before), (ended, tokens) = self._marks[0], self._marks[-1]
        timed = steps - self._untimed
        rate, samples = None, None
        if timed > 0:
            clock, seen = self._marks[self._untimed]
            rate = (tokens - seen) / (ended - clock)
            samples = timed * self._batch * self._processes / (ended - clock)
        last = [loss for _, loss in self._curve[-max(1, len(self._curve) // 10) :]]
        return TrainingResult(
            loss=sum(last) / len(last) if last else None,
            loss_curve=self._curve,
            steps=steps,
            tokens=tokens - tokens_before,
            seconds=ended - began,
            tokens_per_second=rate,
            samples_per_second=samples,
            warmup_steps_untimed=self._untimed,
            peak_bytes=peak,
            protocol=protocol,
            parts=self._parts,
        )
