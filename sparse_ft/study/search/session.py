"""A search instead of a grid: Optuna proposes cells, executors run them, the best are logged and plotted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.levels import level_steps
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.field import named
from sparse_ft.settings.recovery import TUNED
from sparse_ft.settings.search import SearchSettings
from sparse_ft.study.checks.disk import model_bytes
from sparse_ft.study.display import Display
from sparse_ft.study.phases import Hole
from sparse_ft.study.plan import Plan, make_plan
from sparse_ft.study.queue import RunningExecutor
from sparse_ft.study.search.figures import best_table, plot_trials
from sparse_ft.study.search.trials import TrialJob, open_search, open_storage
from sparse_ft.study.session import Session
from sparse_ft.study.start import STUDY_FILE, changes
from sparse_ft.study.study_file import Study
from sparse_ft.tracking.notes import command_block, markdown_table
from sparse_ft.tracking.record import Tag, best_name
from sparse_ft.tracking.runs import Tracker

__all__ = ["Search", "plan_search", "search_plan"]

# Axes that decide which models, tasks and masks are needed; the others change the training alone.
_NEEDED = named(CellConfig, needed=True)
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


class Search(Session):
    """The trials of a study with a ``search:``, and the best of them.

    Raises:
        UserError: what the study asks for is no search, or one that its trainer cannot run.
    """

    unit = "trials"

    def __init__(self, config: SweepConfig, study: Study):
        self.settings = SearchSettings.parse(study.search or {}, f"Study {study.name}")
        super().__init__(config, search_plan(study))
        if self.settings.first_rung and not self.trainer.can_stop:
            raise UserError(
                f"Study {study.name}: a search with a first_rung stops trainings midway, which trainer {study.trainer} "
                "cannot; leave first_rung out, or take trainer local."
            )
        if self.settings.first_rung and self.gpus_per_cell > 1:
            raise UserError(
                f"Study {study.name}: a search with a first_rung stops trainings midway, which a group of processes "
                "cannot; leave first_rung out, or gpus_per_cell."
            )
        epochs = "num_epochs" in self.settings.space or any(cell.num_epochs is not None for cell in self.plan.configs)
        if self.settings.first_rung and epochs:
            raise UserError(
                f"Study {study.name}: first_rung counts steps, and num_epochs leaves open how many there"
                " are; leave one out."
            )
        self.total = self.settings.trials

    @property
    def expected(self) -> Plan:
        """A cell for every trial, of the largest models and adapters that it may have."""
        ranks = self.settings.space.get("lora_r", [])
        ranks = [ranks["high"]] if isinstance(ranks, Mapping) else ranks
        cells = sorted(self.plan.cells, key=lambda cell: -model_bytes(cell.config, self.bench))
        largest = [replace(cell, config=replace(cell.config, lora_r=max(ranks, default=cell.config.lora_r)))
                   for cell in cells]  # fmt: skip
        return replace(self.plan, cells=tuple(islice(cycle(largest), self.total)))

    @cached_property
    def optuna(self) -> optuna.Study:
        """The trials; those that lost workers were at are ended. Nobody of ours works at one when it is asked for."""
        self.start.folder.mkdir(parents=True, exist_ok=True)
        study = open_search(self.storage, self.start.parent, self.settings)
        _forget_lost(study)
        return study

    @property
    def storage(self) -> str:
        """The database of the trials."""
        return self.settings.storage or f"sqlite:///{(self.start.folder / 'optuna.db').absolute()}"

    def described(self) -> Iterator[str]:
        yield f"study {self.plan.study.name}: {self.total} trials over {', '.join(self.settings.space)}"

    def check(self) -> None:
        """Opens the database, and refuses to resume under another space or objective: Optuna cannot, and would say
        so midway."""
        if self.settings.storage is not None:
            open_storage(self.settings.storage)
        if self.config.resume in (None, "new"):
            return
        for line in changes(Tracker(), self.config.resume, STUDY_FILE, self.plan.study.plain()):
            if line.startswith(("search.space", "search.objective")):
                raise UserError(
                    f"resume: a search keeps the choices and the objective it began with, but {line}; put it back, "
                    "or start a new search with resume=new."
                )

    def drive(self, executor: RunningExecutor, display: Display) -> None:
        states = [trial.state for trial in self.optuna.get_trials(deepcopy=False)]
        display.finished = done = sum(state in _DONE for state in states)
        masks = {
            (mask_set_of(cell.config), cell.config.sparsity): self.phases.masks_of(cell)
            for cell in self.plan.cells
            if cell.masks is not None
        }
        jobs = [
            TrialJob(number, self.plan.cells[0].config, self.settings, self.storage, self.start.parent, masks,
                     self.start.folder / "cells", f"trial-{number}")
            for number in range(len(states), len(states) + self.total - done)  # never twice: they seed the samplers
        ]  # fmt: skip
        self.phases.run_jobs(executor, jobs)
        _forget_lost(self.optuna)

    def finish(self) -> None:
        """The best trial, or the front of a search with two objectives: as a table, a figure, tags and metrics."""
        tracker, parent, folder = self.tracker, self.start.parent, self.start.folder
        trials = self.optuna.get_trials(deepcopy=False)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        best, names = best_trials(self.optuna), self.settings.metrics
        numbers = {trial.number for trial in best}
        records = [_record(trial, names, trial.number in numbers) for trial in trials]
        figure = plot_trials(folder / "search.png", complete, best, self.settings)
        for file in (write_json(folder / "trials.json", records), figure):
            tracker.log_file(parent, file, "search")
        for trial in best:
            tracker.log(trial.user_attrs["run_id"], tags={Tag.BEST: True})
        if len(names) == 2:
            step, steps = level_steps(trial.values[1] for trial in best)
            points = {step(trial.values[1]): trial.values[0] for trial in best}
            tracker.log(parent, curves={"pareto/accuracy": sorted(points.items())}, tags={Tag.STEPS: steps})
        elif best:
            tags = {best_name(key): value for key, value in best[0].params.items()}
            tracker.log(parent, metrics={best_name(names[0]): best[0].values[0]}, tags=tags)
        tracker.note(parent, self._note(complete, best, figure.name))
        self.console.print(best_table(best, self.settings))
        self._print(f"figure: {figure}")

    def _note(self, complete: list[FrozenTrial], best: list[FrozenTrial], figure: str) -> str:
        names = self.settings.metrics
        said = f"A search over {', '.join(self.settings.space)}: {len(complete)} of {self.total} trials have a result."
        heads = ["trial", *self.settings.space, *names]
        chosen = [[trial.params.get(name, "") for name in self.settings.space] for trial in best]
        values = [[f"{value:.4g}" for value in trial.values] for trial in best]
        rows = [[trial.number, *chosen[i], *values[i]] for i, trial in enumerate(best)]
        table = markdown_table(heads, rows, len(heads) - len(names)) if rows else "No trial has a result."
        what = "Trials that no other one beats in both:" if len(names) == 2 else "The best one:"
        return "\n\n".join([said, what, table, f"Figure: `search/{figure}`.", command_block(self.command)])

    def is_open(self, hole: Hole) -> bool:
        """Another start proposes another cell in its place."""
        return True


def search_plan(study: Study) -> Plan:
    """`plan_search` with the settings of the study.

    Raises:
        UserError: as it, or a search that has a grid.
    """
    settings = SearchSettings.parse(study.search or {}, f"Study {study.name}")
    if study.grid:
        raise UserError(f"Study {study.name}: a search has no grid; put lists of choices into search.space.")
    return plan_search(study, settings)


def plan_search(study: Study, settings: SearchSettings) -> Plan:
    """The cells over all choices that need masks, models or tasks of their own; the other fields at their first.

    Raises:
        UserError: a range over what decides masks; a teacher that a search has not.
    """
    if TUNED in (study.cell.get("teacher"), *settings.choices.get("teacher", ())):
        raise UserError(
            f"Study {study.name}: a search has no dense baseline to be its teacher; give dense, a model or runs:/ID."
        )
    needed = {name: axis for name, axis in settings.choices.items() if name in _NEEDED}
    first = {
        name: axis[0] if isinstance(axis, list) else axis["low"]
        for name, axis in settings.space.items()
        if name not in needed
    }
    needed = needed or {"mode": [study.cell.get("mode", CellConfig.mode)]}
    cell = {**study.cell, **first}
    plan = make_plan(replace(study, grid=needed, cell=cell, keep="adapter", dense_baseline=False))
    for name, axis in settings.space.items():
        if isinstance(axis, Mapping) and any(_decides_masks(cell, name, axis) for cell in plan.configs):
            raise UserError(
                f"Study {study.name}: search.space.{name} must be a list: masks are made for each choice once."
            )
    cells = tuple(replace(cell, same_as=None) for cell in plan.cells)
    return replace(plan, study=replace(study, keep="adapter"), cells=cells)


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial, or those that no other beats in both objectives, by rising sparsity; empty before the first."""
    best = study.best_trials
    return best[:1] if len(study.directions) == 1 else sorted(best, key=lambda trial: trial.values[-1])


def _decides_masks(cell: CellConfig, name: str, axis: Mapping[str, Any]) -> bool:
    return len({mask_set_of(replace(cell, **{name: axis[end]})) for end in ("low", "high")}) > 1


def _forget_lost(study: optuna.Study) -> None:
    """Ends the trials that were being run by workers which are gone; called while no worker of ours lives."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _record(trial: FrozenTrial, names: tuple[str, ...], best: bool) -> dict[str, Any]:
    record = {"number": trial.number, "state": trial.state.name, "best": best, "run_id": trial.user_attrs.get("run_id")}
    if trial.state == TrialState.COMPLETE:
        record["values"] = dict(zip(names, trial.values, strict=True))
    return {**record, "params": trial.params, "losses": {str(k): v for k, v in trial.intermediate_values.items()}}
