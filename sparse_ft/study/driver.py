"""The study: mask sets, then cells, as child runs under one parent; models kept, a table and a report at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sparse_ft.analysis.terminal import print_table, table_text, terminal_table
from sparse_ft.analysis.write import AnalysisResult
from sparse_ft.cell.failures import RETRIED, classify
from sparse_ft.cell.identity import cell_identity, mask_key
from sparse_ft.cell.trainer import Trainer
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import write_text
from sparse_ft.levels import level_label
from sparse_ft.progress import duration, shown_progress
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.checks.preflight import check_plan, check_resources, estimate_disk
from sparse_ft.study.checks.time import estimate_time
from sparse_ft.study.display import shown_display
from sparse_ft.study.executors import executor_problems, make_executor, worker_count
from sparse_ft.study.keep import keep_models
from sparse_ft.study.ledger import Start, start_study
from sparse_ft.study.life import close_open_runs, driving, interruptible, resume_command
from sparse_ft.study.phases import Phases, holes_table
from sparse_ft.study.plan import Plan, load_study, make_plan
from sparse_ft.study.report import in_milliseconds, report_study, study_console, ui_command
from sparse_ft.study.trainers import study_trainer
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import artifact_location, tracking_uri

__all__ = ["sweep"]

_SHOWN = 40  # a table of more cells is for a file, not for a terminal


def sweep(config: SweepConfig) -> int:
    """Runs a study to its end, or resumes one. Returns 0 when every cell is FINISHED, else 1.

    Raises:
        UserError: a study that cannot start: its file, a model, a task, masks that make no sense, a disk or a
            memory that cannot hold it; or a run to resume that is none, or is still going on.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after workers were stopped and runs closed.
    """
    study = load_study(config.config)
    if config.trainer is not None:
        study = replace(study, trainer=config.trainer)
    trainer = study_trainer(study.trainer, config)
    if study.search is not None:
        from sparse_ft.study.search.session import search

        return search(config, study, trainer)
    plan, console = make_plan(study), study_console()
    workers = worker_count(config)
    bench = Workbench(shown_progress())
    problems = [*check_plan(plan, bench, trainer), *executor_problems(config, plan)]
    if config.dry_run:
        console.print("\n".join(_described(plan, bench, workers, problems)), highlight=False, soft_wrap=True)
        return 1 if problems else 0
    if not problems:
        artifacts = artifact_location(tracking_uri(), study.name)
        problems = check_resources(plan, bench, Path(config.output_dir), artifacts, workers)
    if problems:
        raise UserError(f"The study {study.name} cannot start. " + " | ".join(problems))
    identities = [cell_identity(cell, bench) for cell in plan.cells]
    mask_keys = [mask_key(item.config, bench) for item in plan.mask_sets]

    with interruptible():
        tracker = Tracker()
        start = start_study(tracker, plan, config, console, identities)
        began = time.monotonic()
        with driving(tracker, start.parent, start.driver) as lost:
            try:
                phases = _run(tracker, start, plan, config, trainer, workers, identities, mask_keys)
            except KeyboardInterrupt:
                if not lost():
                    console.print(f"stopped; to resume: {resume_command(config, start.parent)}", soft_wrap=True)
                raise
            close_open_runs(tracker, start.parent)  # of workers that could not reach the store to say how it ended
            seconds = time.monotonic() - began
            complete = _finish(tracker, start, phases, bench, console) and not phases.stopped
            tracker.log(
                start.parent,
                metrics={"study/holes": len(phases.holes), "time/total_seconds": seconds},
                tags={"complete": complete},
            )
    _print_overhead(console, phases, workers, seconds)
    console.print(f"everything, in a browser: {ui_command(tracker)}", highlight=False, soft_wrap=True)
    again = resume_command(config, start.parent, (hole.kind for hole in phases.holes))
    if phases.holes:
        console.print(holes_table(phases.holes))
        console.print(
            f"{len(phases.holes)} of {len(plan.cells)} cells failed; each run holds its traceback. When the cause is "
            f"put right: {again}",
            style="red",
            soft_wrap=True,
        )
    if phases.stopped:
        said = f"the study was stopped: {phases.stopped}; the rest was not run: {again}"
        console.print(said, style="red", soft_wrap=True)
    return 1 if phases.holes or not complete else 0


def _run(
    tracker: Tracker,
    start: Start,
    plan: Plan,
    config: SweepConfig,
    trainer: Trainer,
    workers: int,
    identities: list[dict[str, str]],
    mask_keys: list[str],
) -> Phases:
    phases = Phases(
        plan, identities, mask_keys, start.ledger, start.folder, tracker, start.parent, config.max_retries
    )  # fmt: skip
    setup = WorkerSetup(tracker.uri, start.parent, start.folder.absolute() / "untuned", trainer)
    with shown_display(len(plan.cells)) as display, tracker.system_metrics(start.parent):
        display.workers = workers
        executor = make_executor(config, setup, display, workers, start.folder / "logs")
        try:
            phases.make_masks(executor)
            phases.run_cells(executor, display)
        finally:
            executor.close()
    return phases


def _finish(tracker: Tracker, start: Start, phases: Phases, bench: Workbench, console: Console) -> bool:
    """Models, report and table. What goes wrong here is said, and the study can be resumed for it: the cells are
    safe. Returns whether all went well and no cell could still be run."""
    study, progress = phases.plan.study, bench.progress
    complete = all(hole.kind not in RETRIED for hole in phases.holes)
    try:
        if study.kept in ("pareto", "all"):
            keep_models(
                tracker, start.parent, start.folder, study.registers, bench, study.kept == "pareto", progress,
                lambda text: console.print(text, style="red", soft_wrap=True),
            )  # fmt: skip
        expected = [cell.canonical() for cell in phases.plan.cells]
        report = report_study(tracker, start.parent, start.folder / "report", study.name, progress, expected)
        _print_report(tracker, start, phases, report, console)
    except Exception as error:
        failure = classify(error)
        console.print(f"the report is not complete: {failure.kind}: {failure.message}", style="red", soft_wrap=True)
        return False
    return complete


def _print_report(
    tracker: Tracker, start: Start, phases: Phases, report: AnalysisResult, console: Console
) -> None:  # fmt: skip
    table = terminal_table(in_milliseconds(tracker.children(start.parent)))
    file = write_text(start.folder / "report" / "table.txt", table_text(table))
    tracker.log_file(start.parent, file, "report")
    if len(phases.plan.cells) <= _SHOWN:
        print_table(console, table)
    for figure in report.figures.values():
        console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
    console.print(f"tables: {start.folder / 'report'}", highlight=False, soft_wrap=True)


def _print_overhead(console: Console, phases: Phases, workers: int, seconds: float) -> None:
    measured = [o.metrics["time/overhead_seconds"] for o in phases.outcomes if "time/overhead_seconds" in o.metrics]
    if measured:
        mean, worst = sum(measured) / len(measured), max(measured)
        console.print(
            f"{len(measured)} cells run in {duration(seconds)} with {workers} worker(s); beyond training and scoring a "
            f"cell took {mean:.2f} s on average, {worst:.2f} s at most",
            highlight=False,
        )


def _described(plan: Plan, bench: Workbench, workers: int, problems: list[str]) -> Iterator[str]:
    same = sum(number is not None for number in plan.same_as)
    yield f"study {plan.study.name}: {len(plan.cells)} cells, {len(plan.mask_sets)} mask sets"
    if same:
        yield f"  {same} cells at 0 % compute the same as another and are recorded, not run"
    for item in plan.mask_sets:
        yield f"  masks {item.name}: {', '.join(level_label(level) for level in item.config.levels)} %"
    for number, (title, twin) in enumerate(zip(plan.titles, plan.same_as, strict=True), 1):
        yield f"  {number:4d}  {title}" + ("" if twin is None else f"  (same as {twin + 1})")
    if not problems:
        yield from estimate_disk(plan, bench, workers).lines()
        tracker = Tracker.of_existing()
        yield from estimate_time(plan, tracker.search() if tracker else (), workers).lines()
    yield from (f"problem: {problem}" for problem in problems)
