"""A study from its checks to its last line: preflight, start, drive, finish, say. Grid and search are its two kinds."""

from __future__ import annotations

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from sparse_ft.cell.failures import RETRIED, classify, parse_retry
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.progress import duration, shown_progress, wide_console
from sparse_ft.settings.command_line import command_line
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.study.checks.disk import estimate_disk
from sparse_ft.study.checks.preflight import check_plan, check_resources
from sparse_ft.study.checks.time import estimate_time
from sparse_ft.study.display import Display, shown_display
from sparse_ft.study.executors import executor_problems, make_executor, runs_elsewhere, worker_count
from sparse_ft.study.heartbeat import close_open_runs, driving, interruptible
from sparse_ft.study.phases import Hole, Phases, holes_table
from sparse_ft.study.plan import Plan
from sparse_ft.study.queue import RunningExecutor
from sparse_ft.study.start import Start, start_study
from sparse_ft.study.trainers import study_trainer
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.record import Tag
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import artifact_location, tracking_uri, ui_command
from sparse_ft.tracking.views import study_view

__all__ = ["Session", "resume_command"]


class Session(ABC):
    """One start of a study. A kind says what is planned, how it is driven and what is made of the results.

    Args:
        config: how to run it.
        plan: the cells, or those that a search begins with.

    Attributes:
        unit: what is counted, in words.
        total: how many of them the study has.
        tracker, start, phases: the store, the study's run and what has come out; once it has been started.
        view: the address of its cells in a browser; empty before its end.
        answer: the study in a sentence, which its last line is; empty where it has none.
    """

    unit: ClassVar[str] = "cells"
    tracker: Tracker
    start: Start
    phases: Phases
    view: str = ""
    answer: str = ""

    def __init__(self, config: SweepConfig, plan: Plan):
        self.config, self.plan, self.total = config, plan, len(plan.cells)
        self.trainer = study_trainer(plan.study.trainer, config)
        self.console, self.bench = wide_console(), Workbench(shown_progress())
        self.workers = worker_count(config, self.gpus_per_cell)

    # -- what a kind of study says

    @property
    def gpus_per_cell(self) -> int:
        """The most processes that run a cell together."""
        return max((cell.gpus_per_cell for cell in self.plan.configs), default=1)

    @property
    def expected(self) -> Plan:
        """What is counted on: of this disk, memory and time are estimated. Of a plan without problems."""
        return self.plan

    @property
    def command(self) -> str:
        """The command that runs the study once more."""
        return command_line("sweep", self.config, ("resume",))

    @abstractmethod
    def described(self) -> Iterator[str]:
        """The plan for people, as a dry run prints it."""

    @abstractmethod
    def drive(self, executor: RunningExecutor, display: Display) -> None:
        """Runs what is to be run, once the masks are made."""

    @abstractmethod
    def finish(self) -> None:
        """Makes models, tables and figures of the results, logs and prints them."""

    def check(self) -> None:
        """Raises UserError where something else does not hold, before anything is written."""
        return

    def is_open(self, hole: Hole) -> bool:
        """Whether another start would try it again."""
        return hole.kind in RETRIED

    # -- what all have in common

    def run(self) -> int:
        """Runs the study to its end, or resumes it. Returns 0 when nothing failed and nothing is left, else 1.

        Raises:
            UserError: it cannot start: its file, a model, a task, masks that make no sense, a disk or a memory that
                cannot hold it; or the run to resume is no study, or is still going on.
            KeyboardInterrupt: Ctrl-C or SIGTERM, after workers were stopped and runs closed.
        """
        repeat = not self.config.dry_run  # of which a start makes all checks
        problems = [
            *check_plan(self.plan, self.bench, self.trainer, repeat),
            *executor_problems(self.config, self.plan),
        ]
        if self.plan.study.enlarged:
            self._print(f"a GPU is here: {self.total} {self.unit}, as on_gpu in {self.config.config} says")
        if self.config.dry_run:
            self._print("\n".join([*self.described(), *self._prospects(problems)]))
            return 1 if problems else 0
        if not problems:
            folder, artifacts = Path(self.config.output_dir), artifact_location(tracking_uri(), self.plan.study.name)
            here = not runs_elsewhere(self.config)
            problems = check_resources(self.expected, self.bench, folder, artifacts, self.workers, here)
        if problems:
            raise UserError(f"The study {self.plan.study.name} cannot start. " + " | ".join(problems))
        self.check()
        self.plan = self.plan.identified(self.bench)
        with interruptible():
            self.tracker = Tracker()
            self.start = start_study(self.tracker, self.plan, self.config, self.console)
            self.phases = Phases(self.plan, self.start, self.tracker, self.config.max_retries)
            began = time.monotonic()
            with driving(self.tracker, self.start.parent, self.start.driver) as lost:
                try:
                    self._drive()
                except KeyboardInterrupt:
                    if not lost():
                        self._print(f"stopped; to resume: {resume_command(self.config, self.start.parent)}")
                    raise
                # Those of workers that could not reach the store to say how it ended.
                close_open_runs(self.tracker, self.start.parent)
                seconds = time.monotonic() - began
                complete = self._finish()
                self.tracker.log(
                    self.start.parent,
                    metrics={"study/holes": len(self.phases.holes), "time/total_seconds": seconds},
                    tags={Tag.COMPLETE: complete},
                )
        self._say(seconds)
        return 1 if self.phases.holes or not complete else 0

    def _prospects(self, problems: list[str]) -> Iterator[str]:
        if problems:
            yield from (f"problem: {problem}" for problem in problems)
            return
        yield from estimate_disk(self.expected, self.bench, self.workers).lines()
        tracker = Tracker.of_existing()
        yield from estimate_time(self.expected, tracker.search() if tracker else (), self.workers)

    def _drive(self) -> None:
        start, tracker = self.start, self.tracker
        shared = start.folder.absolute() / "untuned"
        setup = WorkerSetup(tracker.uri, start.parent, shared, self.trainer, self.gpus_per_cell)
        with shown_display(self.total) as display, tracker.system_metrics(start.parent):
            display.workers = self.workers
            executor = make_executor(self.config, setup, display, self.workers, start.folder / "logs")
            try:
                self.phases.make_masks(executor)
                if not self.phases.stopped:
                    self.drive(executor, display)
            finally:
                executor.close()

    def _finish(self) -> bool:
        """Whether all went well and nothing could still be run. What goes wrong here is reported, and the study can be
        resumed for it: the cells are safe."""
        try:
            self.view = self._view()
            self.finish()
        except Exception as error:
            failure = classify(error)
            self._print(f"the report is not complete: {failure.kind}: {failure.message}", style="red")
            return False
        return not self.phases.stopped and not any(map(self.is_open, self.phases.holes))

    def _say(self, seconds: float) -> None:
        phases = self.phases
        measured = [o.metrics["time/overhead_seconds"] for o in phases.outcomes if "time/overhead_seconds" in o.metrics]
        if measured:
            mean, worst = sum(measured) / len(measured), max(measured)
            self._print(
                f"{len(measured)} {self.unit} run in {duration(seconds)} with {self.workers} worker(s); beyond "
                f"training and scoring a cell took {mean:.2f} s on average, {worst:.2f} s at most"
            )
        self._print(f"everything, in a browser: {ui_command(self.tracker.uri)}")
        if self.view:
            self._print(f"this study's {self.unit}, with their columns: {self.view}")
        again = resume_command(self.config, self.start.parent, (hole.kind for hole in phases.holes))
        if phases.holes:
            self.console.print(holes_table(phases.holes))
            self._print(
                f"{len(phases.holes)} of {self.total} {self.unit} failed; each run holds its traceback. When the cause "
                f"is put right: {again}",
                style="red",
            )
        if phases.stopped:
            self._print(f"the study was stopped: {phases.stopped}; the rest was not run: {again}", style="red")
        if self.answer:
            self._print(f"answer: {self.answer}", style="bold")

    def _view(self) -> str:
        varied = ("model", "task", "seed")
        axes = [name for name in varied if len({getattr(cell, name) for cell in self.plan.configs}) > 1]
        return study_view(self.tracker, self.start.parent, [f"cfg/{name}" for name in axes])

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True)


def resume_command(config: SweepConfig, parent: str, failed: Iterable[str] = ()) -> str:
    """The command that resumes a study; with the failure classes of its holes that must be asked for."""
    said = plain_values(config)
    values = {name: said[name] for name in ("config", "executor", "max_workers")}
    values |= {"resume": parent, "output_dir": config.output_dir}
    elsewhere = ("ray_address", "slurm", "trainer", "cerebras")
    values |= {name: said[name] for name in elsewhere if getattr(config, name) is not None}
    if asked := parse_retry(config.retry) | ({"bug"} & set(failed)):
        values["retry"] = ",".join(sorted(asked))
    flags = " ".join(f"-P {name}={shlex.quote(str(value))}" for name, value in values.items())
    return f"mlflow run . -e sweep --env-manager local {flags}"
