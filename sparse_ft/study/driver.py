"""The study: mask sets, then cells, as child runs under one parent; a table and a report at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from sparse_ft.analysis.terminal import TERMINAL_WIDTH, terminal_table
from sparse_ft.errors import UserError
from sparse_ft.files import write_text
from sparse_ft.levels import level_label
from sparse_ft.progress import shown_progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.study.cell_settings import check_cell, count
from sparse_ft.study.config import SweepConfig
from sparse_ft.study.executors.serial import run_serial
from sparse_ft.study.failures import Failure, classify
from sparse_ft.study.mask_sets import make_masks
from sparse_ft.study.plan import MaskSetPlan, Plan, load_study, make_plan
from sparse_ft.study.recording import log_failure, log_mask_inputs, log_masks
from sparse_ft.study.reporting import in_milliseconds, report_study, study_console, ui_command
from sparse_ft.study.workbench import Workbench
from sparse_ft.study.worker import Job, Worker
from sparse_ft.tracking.runs import Tracker

__all__ = ["sweep"]

Masks = dict[float, MaskFile] | Failure


def sweep(config: SweepConfig) -> int:
    """Runs a study to its end. Returns 0 when every cell is FINISHED, else 1.

    Raises:
        UserError: a study that cannot start: its file, a model, a task, masks that make no sense.
    """
    plan = make_plan(load_study(config.config))
    console = study_console()
    if config.dry_run:
        console.print("\n".join(_described(plan)), highlight=False)
        return 0
    if config.resume != "none":
        raise UserError("resume: a study cannot be resumed yet; start it again without resume.")
    progress = shown_progress()
    bench = Workbench(progress)
    _check_inputs(plan, bench)

    tracker = Tracker()
    name = plan.study.name
    parent = tracker.start(name, {"kind": "study"})
    folder = Path(config.output_dir) / f"{name}-{parent[:8]}"
    with tracker.ending(parent):
        tracker.log(parent, params={"cfg/study": name, "cfg/cells": len(plan.cells)})
        tracker.log_file(parent, config.config)
        masks = [_make_mask_set(tracker, parent, item, bench, folder / "masks") for item in plan.mask_sets]
        worker = Worker(tracker.uri, parent, bench)
        outcomes = list(run_serial(list(_jobs(plan, masks, folder)), worker, progress))
        report = report_study(tracker, parent, folder / "report", name, progress)
        table = terminal_table(in_milliseconds(tracker.children(parent)))
        _log_table(tracker, parent, table, folder)
    console.print(table)
    for figure in report.figures.values():
        console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
    console.print(f"tables: {folder / 'report'}", highlight=False, soft_wrap=True)
    console.print(f"everything, in a browser: {ui_command(tracker)}", highlight=False, soft_wrap=True)
    failed = sum(outcome.status != "FINISHED" for outcome in outcomes)
    if failed:
        console.print(f"{failed} of {len(outcomes)} cells failed; each run holds its traceback.", style="red")
    return 1 if failed else 0


def _check_inputs(plan: Plan, bench: Workbench) -> None:
    """What would stop cells hours later is asked for now: models, tasks, pruning settings. All problems at once."""
    problems: list[str] = []
    for cell in plan.cells:
        try:
            check_cell(cell)
        except UserError as error:
            problems += [str(error)] if str(error) not in problems else []
    for model in dict.fromkeys(cell.model for cell in plan.cells):
        try:
            bench.checkpoint(model).prunable_shapes()
            bench.tokenizer(model)
        except UserError as error:
            problems.append(str(error))
    for task, data_dir, shots in dict.fromkeys((cell.task, cell.data_dir, cell.num_fewshot) for cell in plan.cells):
        try:
            bench.task(task, data_dir, count(shots))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"The study {plan.study.name} cannot start. " + " | ".join(problems))


def _make_mask_set(tracker: Tracker, parent: str, item: MaskSetPlan, bench: Workbench, folder: Path) -> Masks:
    """Masks of all levels as a child run; a failure is logged there and handed to the cells that need them."""
    run_id = tracker.start_child(parent, f"masks {item.name}", {"kind": "masks"})
    try:
        log_mask_inputs(tracker, run_id, item.config)
        files = make_masks(item.config, bench, folder / item.name)
        log_masks(tracker, run_id, files)
    except Exception as error:
        failure = classify(error)
        log_failure(tracker, run_id, failure)
        tracker.finish(run_id, "FAILED")
        return failure
    except BaseException:
        tracker.finish(run_id, "KILLED")
        raise
    tracker.finish(run_id)
    return {file.sparsity: file for file in files}


def _jobs(plan: Plan, masks: list[Masks], folder: Path) -> Iterator[Job]:
    for cell, number in zip(plan.cells, plan.mask_set_of, strict=True):
        made = None if number is None else masks[number]
        job = Job(cell, made[cell.sparsity] if isinstance(made, dict) else made, folder)
        yield Job(cell, job.masks, folder / "cells" / job.key)


def _described(plan: Plan) -> Iterator[str]:
    yield f"study {plan.study.name}: {len(plan.cells)} cells, {len(plan.mask_sets)} mask sets"
    for item in plan.mask_sets:
        yield f"  masks {item.name}: {', '.join(level_label(level) for level in item.config.levels)} %"
    for number, cell in enumerate(plan.cells, 1):
        yield f"  {number:4d}  {cell.title}"


def _log_table(tracker: Tracker, parent: str, table: object, folder: Path) -> None:
    console = Console(width=TERMINAL_WIDTH, record=True, quiet=True)
    console.print(table)
    tracker.log_file(parent, write_text(folder / "report" / "table.txt", console.export_text()), "report")
