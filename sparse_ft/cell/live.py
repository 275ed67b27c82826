"""Curves of a run while its work goes on: what the progress is told of measurements goes to the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_ft.cell.workbench import Workbench
from sparse_ft.progress import Progress

if TYPE_CHECKING:
    from sparse_ft.tracking.live import LivePoints
    from sparse_ft.tracking.runs import Tracker

__all__ = ["live", "named"]

# Curves whose own name is that of a number of the whole training.
_CURVES = {
    "train/loss": "train/loss_curve",
    "train/tokens_per_second": "train/tokens_per_second_curve",
    "recover/tokens_per_second": "recover/tokens_per_second_curve",
}


@contextmanager
def live(tracker: Tracker, run_id: str, bench: Workbench, folder: Path) -> Iterator[LivePoints]:
    """While its block runs, what is measured on the way reaches the run; at its end all of it has.

    Args:
        tracker: of the run's store.
        run_id: whose.
        bench: whose progress is told of it.
        folder: for the file of what could not be sent.

    Raises:
        UnsentError: the store stayed away; see `sparse_ft.tracking.live.LivePoints`.
    """
    from sparse_ft.tracking.live import LivePoints  # mlflow takes seconds to import

    shown = bench.progress
    with LivePoints(tracker, run_id, folder / f"unsent_{run_id}.jsonl") as points:
        bench.progress = _Measured(shown, points)
        try:
            yield points
        finally:
            bench.progress = shown


def named(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a training measured step by step, by the names of metrics: ``train/loss_curve``, ``recover/grad_norm``."""
    names = {name: f"{stage}/{name}" for name in values}
    return {_CURVES.get(names[name], names[name]): value for name, value in values.items()}


class _Measured(Progress):
    """Shows progress as another does, and hands on what was measured."""

    def __init__(self, shown: Progress, points: LivePoints):
        self._shown, self._points = shown, points

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self._shown.start(stage, total, unit)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._shown.advance(amount, note)

    def stop(self) -> None:
        self._shown.stop()

    def say(self, text: str) -> None:
        self._shown.say(text)

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        self._points.add(step, values)
