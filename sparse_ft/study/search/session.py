"""A search instead of a grid: Optuna proposes cells, executors run them, the best are logged and plotted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparse_ft.analysis.performance import pareto_front
from sparse_ft.cell.failures import Failure
from sparse_ft.cell.identity import cell_identity, mask_key
from sparse_ft.cell.trainer import Trainer
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import atomic_path, write_json
from sparse_ft.levels import level_label
from sparse_ft.progress import shown_progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.field import named
from sparse_ft.study.checks.preflight import check_plan, check_resources
from sparse_ft.study.display import shown_display
from sparse_ft.study.executors import executor_problems, make_executor, worker_count
from sparse_ft.study.ledger import STUDY_FILE, Start, changes, describe, start_study
from sparse_ft.study.life import driving, interruptible, resume_command
from sparse_ft.study.phases import Hole, Phases, holes_table
from sparse_ft.study.plan import Plan, Study, make_plan
from sparse_ft.study.queue import Queue
from sparse_ft.study.report import study_console, ui_command
from sparse_ft.study.search.trials import OBJECTIVES, SearchSettings, TrialJob, open_search, open_storage
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import artifact_location, tracking_uri

__all__ = ["search"]

# Axes that decide which models, tasks and masks are needed; the others change the training alone.
_NEEDED = named(CellConfig, needed=True)


def search(config: SweepConfig, study: Study, trainer: Trainer) -> int:
    """Runs the trials of a study with a ``search:``, or the rest of them. Returns 0 when every one has ended.

    Raises:
        UserError: as `sparse_ft.study.driver.sweep`.
    """
    settings = SearchSettings.parse(study.search or {}, f"Study {study.name}")
    if study.grid:
        raise UserError(f"Study {study.name}: a search has no grid; put lists of choices into search.space.")
    if settings.first_rung and not trainer.can_stop:
        raise UserError(
            f"Study {study.name}: a search with a first_rung stops trainings midway, which trainer {study.trainer} "
            "cannot; leave first_rung out, or take trainer local."
        )
    plan = _plan(study, settings)
    console, workers = study_console(), worker_count(config)
    bench = Workbench(shown_progress())
    problems = [*check_plan(plan, bench, trainer), *executor_problems(config, plan)]
    if not problems:
        artifacts = artifact_location(tracking_uri(), study.name)
        problems = check_resources(plan, bench, Path(config.output_dir), artifacts, workers)
    if not problems and settings.storage != "none" and not config.dry_run:
        open_storage(settings.storage)
    if problems:
        raise UserError(f"The study {study.name} cannot start. " + " | ".join(problems))
    if config.dry_run:
        console.print(f"study {study.name}: {settings.trials} trials over {', '.join(settings.space)}", highlight=False)
        return 0
    with interruptible():
        tracker = Tracker()
        if config.resume not in (None, "new"):
            _check_resumed(tracker, config.resume, study)
        identities = [cell_identity(cell, bench) for cell in plan.cells]
        mask_keys = [mask_key(item.config, bench) for item in plan.mask_sets]
        start = start_study(tracker, plan, config, console, identities)
        with driving(tracker, start.parent, start.driver) as lost:
            try:
                trials, holes, stopped = _run(
                    tracker, start, plan, settings, config, trainer, workers, identities, mask_keys
                )
            except KeyboardInterrupt:
                if not lost():
                    console.print(f"stopped; to resume: {resume_command(config, start.parent)}", soft_wrap=True)
                raise
            best = _log_best(tracker, start, settings, trials)
            tracker.log(start.parent, metrics={"study/holes": len(holes)}, tags={"complete": not (holes or stopped)})
    _print_best(console, settings, best)
    console.print(f"figure: {start.folder / 'search.png'}", highlight=False, soft_wrap=True)
    console.print(f"everything, in a browser: {ui_command(tracker)}", highlight=False, soft_wrap=True)
    if holes:
        console.print(holes_table(holes))
        console.print(f"{len(holes)} of {settings.trials} trials failed.", style="red")
    if stopped:
        again = resume_command(config, start.parent)
        console.print(f"the search was stopped: {stopped}; to resume: {again}", style="red", soft_wrap=True)
    return 1 if holes or stopped else 0


def _run(
    tracker: Tracker,
    start: Start,
    plan: Plan,
    settings: SearchSettings,
    config: SweepConfig,
    trainer: Trainer,
    workers: int,
    identities: list[dict[str, str]],
    mask_keys: list[str],
) -> tuple[list[FrozenTrial], list[Hole], str]:
    phases = Phases(
        plan, identities, mask_keys, start.ledger, start.folder, tracker, start.parent, config.max_retries
    )  # fmt: skip
    setup = WorkerSetup(tracker.uri, start.parent, start.folder.absolute() / "untuned", trainer)
    start.folder.mkdir(parents=True, exist_ok=True)
    storage = settings.storage
    if storage == "none":
        storage = f"sqlite:///{(start.folder / 'optuna.db').absolute()}"
    study = open_search(storage, start.parent, settings)
    _forget_lost(study)
    done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.get_trials(deepcopy=False))
    asked = len(study.get_trials(deepcopy=False))  # numbers never come twice: they seed the samplers
    with shown_display(settings.trials) as display, tracker.system_metrics(start.parent):
        display.workers, display.finished = workers, done
        executor = make_executor(config, setup, display, workers, start.folder / "logs")
        try:
            phases.make_masks(executor)
            if phases.stopped:
                return study.get_trials(deepcopy=False), [], phases.stopped
            masks = _by_kind(plan, phases)
            cell, folder = plan.cells[0], start.folder / "cells"
            jobs = [
                TrialJob(number, cell, settings, storage, start.parent, masks, folder, f"trial-{number}")
                for number in range(asked, asked + settings.trials - done)
            ]
            queue = Queue(jobs, config.max_retries)
            executor.run(queue)
        finally:
            executor.close()
    _forget_lost(study)
    holes = [Hole(o.job.title, o.failure.kind, o.failure.message, o.run_id) for o in queue.outcomes if o.failure]
    return study.get_trials(deepcopy=False), holes, queue.stopped


def _plan(study: Study, settings: SearchSettings) -> Plan:
    """The cells over all choices that need masks, models or tasks of their own; the other fields at their first."""
    needed = {name: axis for name, axis in settings.choices.items() if name in _NEEDED}
    first = {
        name: axis[0] if isinstance(axis, list) else axis["low"]
        for name, axis in settings.space.items()
        if name not in needed
    }
    if not needed:
        mode = study.cell.get("mode", CellConfig.mode)
        needed = {"mode": [mode]}
    plan = make_plan(replace(study, grid=needed, cell={**study.cell, **first}, keep="adapter", dense_baseline=False))
    for name, axis in settings.space.items():
        if isinstance(axis, Mapping) and any(_decides_masks(cell, name, axis) for cell in plan.cells):
            raise UserError(
                f"Study {study.name}: search.space.{name} must be a list: masks are made for each choice once."
            )
    return replace(plan, study=replace(study, keep="adapter"), same_as=(None,) * len(plan.cells))


def _decides_masks(cell: CellConfig, name: str, axis: Mapping[str, Any]) -> bool:
    return len({mask_set_of(replace(cell, **{name: axis[end]})) for end in ("low", "high")}) > 1


def _check_resumed(tracker: Tracker, parent: str, study: Study) -> None:
    """Refuses to resume a search under another space or objective: Optuna cannot, and would say so midway."""
    for line in changes(tracker, parent, STUDY_FILE, describe(study)):
        if line.startswith(("search.space", "search.objective")):
            raise UserError(
                f"resume: a search keeps the choices and the objective it began with, but {line}; put it back, "
                "or start a new search with resume=new."
            )


def _by_kind(plan: Plan, phases: Phases) -> dict[tuple[Any, float], MaskFile | Failure]:
    masks: dict[tuple[Any, float], MaskFile | Failure] = {}
    for cell, number in zip(plan.cells, plan.mask_set_of, strict=True):
        if number is not None:
            made = phases.masks[number]
            masks[mask_set_of(cell), cell.sparsity] = made[cell.sparsity] if isinstance(made, Mapping) else made
    return masks


def _forget_lost(study: optuna.Study) -> None:
    """Ends the trials that were being run by workers which are gone; called while no worker of ours lives."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _log_best(
    tracker: Tracker, start: Start, settings: SearchSettings, trials: list[FrozenTrial]
) -> list[FrozenTrial]:  # fmt: skip
    """The best trial, or the front of a search with two objectives: as a table, a figure, tags and metrics."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = _front(complete, [direction for _, direction in OBJECTIVES[settings.objective]])
    names = [metric for metric, _ in OBJECTIVES[settings.objective]]
    records = [_record(trial, names, trial in best) for trial in trials]
    tracker.log_file(start.parent, write_json(start.folder / "trials.json", records), "search")
    tracker.log_file(start.parent, _plot(start.folder / "search.png", complete, best, names), "search")
    for trial in best:
        tracker.log(trial.user_attrs["run_id"], tags={"best": True})
    if best and len(names) == 1:
        tracker.log(start.parent, metrics={f"best/{names[0]}": best[0].values[0]})
        tracker.log(start.parent, tags={f"best/{key}": value for key, value in best[0].params.items()})
    if len(names) == 2:
        points = {round(100 * trial.values[1]): trial.values[0] for trial in best}
        tracker.log(start.parent, curves={"pareto/accuracy": sorted(points.items())})
    return best


def _front(trials: list[FrozenTrial], directions: list[str]) -> list[FrozenTrial]:
    """The trials that no other beats in every objective; with one objective the best one."""
    if not trials:
        return []
    signs = [1 if direction == "maximize" else -1 for direction in directions]
    points = np.array([trial.values for trial in trials]) * signs
    return [trials[number] for number in reversed(pareto_front(points[:, 0], points[:, -1]))]


def _record(trial: FrozenTrial, names: list[str], best: bool) -> dict[str, Any]:
    record = {"number": trial.number, "state": trial.state.name, "best": best, "run_id": trial.user_attrs.get("run_id")}
    if trial.state == TrialState.COMPLETE:
        record["values"] = dict(zip(names, trial.values, strict=True))
    return {**record, "params": trial.params, "losses": {str(k): v for k, v in trial.intermediate_values.items()}}


def _plot(path: Path, trials: list[FrozenTrial], best: list[FrozenTrial], names: list[str]) -> Path:
    """One objective: every trial's value and the best so far. Two: accuracy against sparsity, with the front."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    if len(names) == 1:
        numbers, values = [t.number for t in trials], [t.values[0] for t in trials]
        pick = min if names[0] == "eval/loss" else max
        axes.plot(numbers, values, "o", color="0.55", label="trial")
        axes.step(
            numbers, [pick(values[: i + 1]) for i in range(len(values))], where="post", color="C0", label="best so far"
        )  # fmt: skip
        axes.set(xlabel="trial", ylabel=names[0])
    else:
        axes.plot([100 * t.values[1] for t in trials], [t.values[0] for t in trials], "o", color="0.55", label="trial")
        axes.plot(
            [100 * t.values[1] for t in best], [t.values[0] for t in best], "o-", color="C0", label="Pareto front"
        )
        axes.set(xlabel="sparsity after the merge, %", ylabel="accuracy")
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def _print_best(console: Console, settings: SearchSettings, best: list[FrozenTrial]) -> None:
    names = [metric for metric, _ in OBJECTIVES[settings.objective]]
    title = "best trial" if len(names) == 1 else "Pareto front"
    table = Table("trial", *names, *settings.space, title=title, title_justify="left", box=SIMPLE_HEAD)
    for trial in best:
        values = [
            f"{100 * v:.1f} %" if "sparsity" in n else f"{v:.4f}" for n, v in zip(names, trial.values, strict=True)
        ]
        chosen = [_shown(name, trial.params.get(name)) for name in settings.space]
        table.add_row(str(trial.number), *values, *chosen)
    console.print(table)


def _shown(name: str, value: Any) -> str:
    if name == "sparsity":
        return f"{level_label(value)} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
