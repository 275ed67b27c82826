"""What a study shows while it runs: one live display on a terminal, a line per cell elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparse_ft.levels import level_label
from sparse_ft.progress import duration, standing
from sparse_ft.settings.cell import CellConfig
from sparse_ft.study.jobs import Job, Outcome
from sparse_ft.study.queue import Listener

__all__ = ["Display", "LiveDisplay", "shown_display"]

_LONG = 60  # seconds after which a stage is worth a line of its own where nothing is redrawn, and another, and so on


@dataclass
class _WorkerState:
    """What one worker is doing."""

    job: Job
    stage: str = ""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    note: str = ""
    began: float = 0.0
    told: float = 0.0


class Display(Listener):
    """Keeps count, and prints a line as each cell ends: for logs and pipes.

    Args:
        total: cells of the study.
        finished: those that were FINISHED before this start.
        workers: how many work at once, for the time left.
        stream: where lines go; stderr by default.
    """

    def __init__(self, total: int, finished: int = 0, workers: int = 1, stream: TextIO | None = None):
        self.total, self.finished, self.failed, self.workers = total, finished, 0, workers
        self._stream = stream or sys.stderr
        self._states: dict[int, _WorkerState] = {}
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._best: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
        self._rate: float | None = None
        self._awaited: Counter[tuple[str, str]] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, text: str) -> None:
        """A line of its own."""
        print(text, file=self._stream, flush=True)

    def awaits(self, cells: Iterable[CellConfig]) -> None:
        """The cells that will be run, for the time left: not those that were done before or are only recorded."""
        self._awaited = Counter((cell.model, cell.task) for cell in cells)

    # -- what the workers report

    def started(self, worker: int, job: Job) -> None:
        self._states[worker] = _WorkerState(job, began=time.monotonic(), told=time.monotonic())

    def stage(self, worker: int, stage: str, total: float, unit: str) -> None:
        state = self._states.get(worker)
        if state is None:
            return
        spent = time.monotonic() - state.began
        if state.stage and spent >= _LONG:
            self._long_stage(state, spent)
        state.stage, state.total, state.unit, state.done, state.note = stage, total, unit, 0.0, ""
        state.began = state.told = time.monotonic()

    def advanced(self, worker: int, amount: float, note: str) -> None:
        state = self._states.get(worker)
        if state is None:
            return
        state.done += amount
        state.note = note or state.note
        now = time.monotonic()
        if now - state.told >= _LONG and state.done < state.total:
            state.told = now
            self._in_long_stage(state, now - state.began)

    def ended(self, worker: int, outcome: Outcome, over: bool = True) -> None:
        self._states.pop(worker, None)
        job = outcome.job
        if job.is_cell and over:
            self._count(job.cell, outcome)
        self.say(self._line(outcome, over))

    def recorded(self, failed: bool) -> None:
        """A cell was recorded without being run: it computes the same as another."""
        self.failed += failed
        self.finished += not failed

    # -- what is known

    @property
    def seconds_left(self) -> float | None:
        """From the cells measured so far: those of a model and task take alike, and one of which nothing is known
        yet is taken for the mean. None before the first."""
        every = [value for values in self._seconds.values() for value in values]
        if not every:
            return None
        if self._awaited is None:
            left = max(0, self.total - self.finished - self.failed)
            return sum(every) / len(every) * left / self.workers
        means = {kind: sum(values) / len(values) for kind, values in self._seconds.items() if values}
        mean = sum(every) / len(every)
        return sum(count * means.get(kind, mean) for kind, count in self._awaited.items()) / self.workers

    @property
    def best(self) -> Mapping[tuple[str, str], Mapping[float, float]]:
        """(model, task) -> sparsity -> the best accuracy so far."""
        return self._best

    def _count(self, cell: CellConfig, outcome: Outcome) -> None:
        if self._awaited is not None:
            self._awaited[cell.model, cell.task] -= 1
        if outcome.failure is not None:
            self.failed += 1
            return
        self.finished += 1
        self._seconds[cell.model, cell.task].append(outcome.seconds)
        self._rate = outcome.metrics.get("train/tokens_per_second", self._rate)
        accuracy = outcome.metrics.get("eval/accuracy")
        if accuracy is not None:
            level = outcome.metrics.get("sparsity/target", 0.0)
            best = self._best[cell.model.rstrip("/").split("/")[-1], cell.task]
            best[level] = max(best.get(level, accuracy), accuracy)

    def _long_stage(self, state: _WorkerState, spent: float) -> None:
        note = f", {state.note}" if state.note else ""
        self.say(f"          {state.job.title}: {state.stage} took {duration(spent)}{note}")

    def _in_long_stage(self, state: _WorkerState, spent: float) -> None:
        where = standing(state.done, state.total, state.unit, spent, state.note)
        self.say(f"          {state.job.title}: {state.stage}: {where}")

    def _line(self, outcome: Outcome, over: bool) -> str:
        job = outcome.job
        width = len(str(self.total))
        number = f"[{self.finished + self.failed:{width}d}/{self.total}]" if job.is_cell else "[masks]"
        facts = []
        if outcome.failure is not None:
            facts.append(f"{outcome.failure.kind}: {outcome.failure.message}")
        for name, form in (("eval/accuracy", "accuracy {:.3f}"), ("train/tokens_per_second", "{:,.0f} tokens/s")):
            if name in outcome.metrics:
                facts.append(form.format(outcome.metrics[name]))
        facts.append(duration(outcome.seconds))
        left = self.seconds_left
        rest = f"; {duration(left)} left" if left and job.is_cell else ""
        bad = "" if over else "; it will be tried again"
        bad += f"; {self.failed} failed" if self.failed else ""
        return f"{number} {outcome.status} {job.title}: {', '.join(facts)}{bad}{rest}"


class LiveDisplay(Display):
    """One display that is drawn again and again: counts, time left, a bar a worker, the best so far."""

    def __init__(self, total: int, finished: int = 0, workers: int = 1, console: Console | None = None):
        super().__init__(total, finished, workers)
        self._live = Live(
            console=console or Console(stderr=True), get_renderable=self._draw, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)

    def ended(self, worker: int, outcome: Outcome, over: bool = True) -> None:
        self._states.pop(worker, None)
        if outcome.job.is_cell and over:
            self._count(outcome.job.cell, outcome)
        if outcome.failure is not None:  # what went well is in the counts
            self.say(self._line(outcome, over))

    def _long_stage(self, state: _WorkerState, spent: float) -> None:
        """The bar shows it."""

    _in_long_stage = _long_stage

    def _draw(self) -> RenderableType:
        running = sum(state.job.is_cell for state in list(self._states.values()))
        left = max(0, self.total - self.finished - self.failed - running)
        counts = Text.assemble(
            (f"{self.finished} done", "green"),
            "  ",
            (f"{self.failed} failed", "bold red" if self.failed else "dim"),
            f"  {running} running  {left} left",
        )
        if self.seconds_left is not None:
            counts.append(f"  {duration(self.seconds_left)} to go")
        if self._rate is not None:
            counts.append(f"  {self._rate:,.0f} tokens/s", style="dim")
        whole = Table.grid()  # a bar by itself ends without a new line
        whole.add_row(ProgressBar(self.total, self.finished + self.failed, width=60))
        return Group(counts, whole, self._bars(), self._bests())

    def _bars(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        for _, state in sorted(self._states.items()):
            share = ProgressBar(state.total or 1, state.done, width=20)
            done = f"{state.done:.0f}/{state.total:.0f} {state.unit}" if state.total and state.unit != "B" else ""
            spent = duration(time.monotonic() - state.began)
            grid.add_row(Text(state.job.title), Text(state.stage, style="cyan"), share, done, state.note, spent)
        return grid

    def _bests(self) -> RenderableType:
        levels = sorted({level for best in self._best.values() for level in best})
        if not levels:
            return Text("")
        table = Table(title="best accuracy so far, by sparsity in %", title_justify="left", box=None, padding=(0, 1))
        table.add_column("")
        for level in levels:
            table.add_column(level_label(level), justify="right")
        for (model, task), best in sorted(self._best.items()):
            table.add_row(f"{model} {task}", *(f"{best[level]:.3f}" if level in best else "" for level in levels))
        return table


def shown_display(total: int) -> Display:
    """The live one where stderr is a terminal, lines elsewhere."""
    return LiveDisplay(total) if sys.stderr.isatty() else Display(total)
