"""Progress of long work: the parts report, whoever started them decides how it is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "SILENT",
    "BarProgress",
    "LineProgress",
    "Progress",
    "duration",
    "shown_progress",
    "standing",
    "wide_console",
]


class Progress:
    """What a long piece of work reports. This base class shows nothing.

    ``start`` opens a stage of ``total`` steps, ``advance`` moves it, ``stop`` closes it. Stages do not
    nest: a new ``start`` closes the one before.
    """

    def start(self, stage: str, total: float, unit: str = "") -> None:
        """Opens a stage: its name, the number of steps and their unit (``B`` for bytes)."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Moves the open stage by ``amount``; ``note`` is a short remark such as the current loss."""

    def stop(self) -> None:
        """Closes the open stage."""

    def say(self, text: str) -> None:
        """A line of its own, between stages."""

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """What was measured at a step, by the names of metrics: points of the run's curves."""


SILENT = Progress()


class BarProgress(Progress):
    """A bar on the terminal for the open stage, with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self._rich = Rich(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[done]:>22}"),
            TextColumn("{task.fields[rate]:>10}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = None
        self._unit = ""

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self.stop()
        self._unit = unit
        self._rich.start()
        self._began = time.monotonic()
        self._task = self._rich.add_task(stage, total=total, done=_amounts(0, total, unit), rate="", note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self._task is None:
            return
        task = self._rich.tasks[-1]
        done = _amounts(task.completed + amount, task.total or 0, self._unit)
        rate = _rate((task.completed + amount) / max(time.monotonic() - self._began, 1e-9), self._unit)
        fields = {"note": note} if note else {}
        self._rich.update(self._task, advance=amount, done=done, rate=rate, **fields)

    def stop(self) -> None:
        if self._task is None:
            return
        self._rich.stop()
        self._rich.remove_task(self._task)
        self._task = None

    def say(self, text: str) -> None:
        self._rich.console.print(text, style="bold", highlight=False)


class LineProgress(Progress):
    """One line when a stage starts, one when it ends and one every now and then in between, for logs and pipes.

    Args:
        stream: where lines go; stderr by default.
        every: seconds between the lines of an open stage.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 30.0) -> None:
        self._stream, self._every = stream or sys.stderr, every
        self._stage: str | None = None

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self.stop()
        self._stage, self._total, self._unit = stage, total, unit
        self._done, self._note, self._began = 0.0, "", time.monotonic()
        self._last = self._began
        print(f"{stage} ...", file=self._stream, flush=True)

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self._stage is None:
            return
        self._done += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._last >= self._every and self._done < self._total:
            self._last = now
            where = standing(self._done, self._total, self._unit, now - self._began, self._note)
            print(f"{self._stage}: {where}", file=self._stream, flush=True)

    def stop(self) -> None:
        if self._stage is None:
            return
        seconds = time.monotonic() - self._began
        note = f", {self._note}" if self._note else ""
        amounts = _amounts(self._done, self._total, self._unit)
        print(f"{self._stage}: {amounts} in {seconds:.1f} s{note}", file=self._stream, flush=True)
        self._stage = None

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def shown_progress() -> Progress:
    """Bars where stderr is a terminal, lines elsewhere."""
    return BarProgress() if sys.stderr.isatty() else LineProgress()


def duration(seconds: float) -> str:
    """A time as people say it: ``4.1 s``, ``12 min``, ``3 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def standing(done: float, total: float, unit: str, seconds: float, note: str = "") -> str:
    """Where an open stage is after so many seconds: ``3/12 steps after 40.0 s, about 2 min left, loss 1.5``."""
    left = f", about {duration(seconds * (total - done) / done)} left" if 0 < done < total else ""
    return f"{_amounts(done, total, unit)} after {duration(seconds)}{left}" + (f", {note}" if note else "")


def _amounts(done: float, total: float, unit: str) -> str:
    if unit == "B":
        return f"{done / 1e9:.2f}/{total / 1e9:.2f} GB" if total >= 1e9 else f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"
    return f"{done:g}/{total:g} {unit}".rstrip()


def _rate(per_second: float, unit: str) -> str:
    if unit == "B":
        return f"{per_second / 1e9:.2f} GB/s" if per_second >= 1e9 else f"{per_second / 1e6:.1f} MB/s"
    return f"{per_second:.3g}/s"


def wide_console() -> Console:
    """A console for long lines and tables; rich gives a pipe 80 columns, too few for them."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=132)
