"""One trial of a search, where it runs: Optuna's proposal becomes a cell, its scores become the trial's values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from sparse_ft.cell.failures import Failure
from sparse_ft.cell.masks import mask_file
from sparse_ft.errors import UserError
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.field import plain_values
from sparse_ft.settings.parser import Parser
from sparse_ft.study.queue import Job, Outcome

__all__ = ["OBJECTIVES", "SearchSettings", "TrialJob", "open_search", "open_storage", "run_trial"]

# objective -> (metric, direction) of each of its values
OBJECTIVES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "loss": (("eval/loss", "minimize"),),
    "accuracy": (("eval/accuracy", "maximize"),),
    "accuracy_sparsity": (("eval/accuracy", "maximize"), ("sparsity/after_merge", "maximize")),
}
_HEARTBEAT, _GRACE = 10, 40  # seconds


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Args:
        space: cell field -> a list of choices, or a range {low, high, log, step}.
        trials: how many.
        objective: loss (lower is better), accuracy, or accuracy_sparsity (both, NSGA-II).
        first_rung: optimizer steps after which a trial may be stopped for the first time; 0 never stops one.
        reduction_factor: of the trials at a rung one in so many goes on; the next rung is so many times later.
        seed: of the sampler.
        storage: database of the trials, or none for a file in the study's folder.
    """

    space: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 20
    objective: str = "loss"
    first_rung: int = 0
    reduction_factor: int = 3
    seed: int = 0
    storage: str = "none"

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> SearchSettings:
        """The settings of a study's ``search:``.

        Raises:
            UserError: an unknown key, or a value that no search has.
        """
        known = {entry.name: entry for entry in fields(cls)}
        values = dict(values)
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{where}: search has no '{name}'; it has {', '.join(known)}.")
            if known[name].type != "int":
                continue
            if isinstance(value, float) and value.is_integer():
                values[name] = value = int(value)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
                raise UserError(f"{where}: search.{name} is '{value}'; it must be a whole number, 0 or more.")
        settings = cls(**values)
        if settings.objective not in OBJECTIVES:
            raise UserError(f"{where}: search.objective is '{settings.objective}'; choose {' | '.join(OBJECTIVES)}.")
        if settings.trials < 1 or settings.reduction_factor < 2:
            raise UserError(f"{where}: search needs trials of 1 or more and a reduction_factor of 2 or more.")
        if settings.first_rung and len(OBJECTIVES[settings.objective]) > 1:
            raise UserError(f"{where}: Optuna stops no trial of a search with two objectives; leave first_rung out.")
        if not isinstance(settings.space, Mapping) or not settings.space:
            raise UserError(f"{where}: search.space is empty; give lists of choices, or ranges with low and high.")
        return replace(settings, space={name: _axis(name, axis, where) for name, axis in settings.space.items()})

    @property
    def choices(self) -> dict[str, list[Any]]:
        """The axes that are lists."""
        return {name: list(axis) for name, axis in self.space.items() if isinstance(axis, list)}

    def rungs(self, max_steps: int) -> tuple[int, ...]:
        """The optimizer steps after which a trial of ``max_steps`` may be stopped."""
        steps, step = [], self.first_rung
        while 0 < step < max_steps:
            steps.append(step)
            step *= self.reduction_factor
        return tuple(steps)


@dataclass(frozen=True)
class TrialJob:
    """Asks a worker to run the next trial, whatever Optuna proposes.

    Attributes:
        number: of this job in the study; makes its sampler's seed.
        cell: the values that no axis of the search sets.
        settings: of the search.
        storage, name: where the trials are.
        masks: (mask set's configuration, sparsity) -> its file, or why there is none.
        folder: the study's folder for cells.
    """

    number: int
    cell: CellConfig
    settings: SearchSettings
    storage: str
    name: str
    masks: Mapping[tuple[Any, float], MaskFile | Failure]
    folder: Path
    key: str = ""
    attempt: int = 1

    @property
    def model(self) -> str:
        """The model, as far as it is known before the proposal."""
        return self.cell.model

    @property
    def title(self) -> str:
        """A short name for people."""
        return f"trial {self.number}"


def open_storage(storage: str) -> optuna.storages.RDBStorage:
    """The database of the trials, its tables made if need be; workers send heartbeats there.

    Raises:
        UserError: no driver, no database in reach, or one with the tables of another program.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                storage,
                engine_kwargs={"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else None,
                heartbeat_interval=_HEARTBEAT,
                grace_period=_GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=2),
            )
    except (ImportError, RuntimeError, ValueError, SQLAlchemyError) as error:
        reason, advice = str(error).splitlines()[0], "see that it runs and that its address is right."
        if isinstance(error, ImportError):
            advice = "install its driver (PostgreSQL: pip install 'sparse_ft[postgresql]')."
        elif isinstance(error, RuntimeError):  # Optuna and MLflow both note their schema in alembic_version
            reason = "it holds the tables of another program, MLflow's perhaps, or of another Optuna"
            advice = "give the search a database of its own."
        raise UserError(f"search.storage {storage} cannot be used: {reason}; {advice}") from error


def open_search(storage: str, name: str, settings: SearchSettings, seed: int = 0) -> optuna.Study:
    """The Optuna study, made if need be. Trials whose worker is gone are found by their heartbeat and proposed
    again. (`GridSampler` would never retry one; `mlflow.optuna.MlflowStorage` makes a study twice.)
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        database = open_storage(storage)
        directions = [direction for _, direction in OBJECTIVES[settings.objective]]
        if len(directions) > 1:
            sampler: optuna.samplers.BaseSampler = optuna.samplers.NSGAIISampler(
                population_size=max(4, settings.trials // 5), seed=settings.seed + seed
            )
            pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        else:
            sampler = optuna.samplers.TPESampler(seed=settings.seed + seed, constant_liar=True)
            pruner = optuna.pruners.NopPruner()
            if settings.first_rung:
                pruner = optuna.pruners.SuccessiveHalvingPruner(settings.first_rung, settings.reduction_factor)
        return optuna.create_study(
            storage=database,
            study_name=name,
            directions=directions,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )


def propose(trial: optuna.Trial, settings: SearchSettings, cell: CellConfig) -> CellConfig:
    """The cell that a trial proposes."""
    values: dict[str, Any] = {}
    for name, axis in settings.space.items():
        if isinstance(axis, list):
            values[name] = trial.suggest_categorical(name, axis)
        elif isinstance(axis["low"], int):
            step = axis.get("step", 1)
            values[name] = trial.suggest_int(name, axis["low"], axis["high"], step=step, log=axis.get("log", False))
        else:
            low, high = axis["low"], axis["high"]
            values[name] = trial.suggest_float(name, low, high, step=axis.get("step"), log=axis.get("log", False))
    proposed = Parser(CellConfig).values(values, f"trial {trial.number}")
    return replace(cell, **{name: getattr(proposed, name) for name in values})


def run_trial(job: TrialJob, run: Callable[[Job, Judge], Outcome]) -> Outcome:
    """Takes the next trial from Optuna and runs it as a cell.

    Args:
        job: which search.
        run: runs a cell as a run of its own, asking the `Judge` at its rungs.

    Returns:
        the outcome of the cell's run, with this job in place of the cell's.
    """
    study = open_search(job.storage, job.name, job.settings, job.number)
    outcomes: list[Outcome] = []

    def objective(trial: optuna.Trial) -> Sequence[float]:
        cell = propose(trial, job.settings, job.cell)
        kind, masks = mask_set_of(cell), None
        if kind is not None:
            masks = job.masks[kind, cell.sparsity]
        elif cell.pruned:
            given = mask_file(cell.masks)
            cell, masks = replace(cell, **given.described), given.file
        tags = {"trial": str(trial.number), "search": job.name}
        key = f"{job.name}-{trial.number}"
        work = Job(cell, masks, job.folder / key, key=key, attempt=job.attempt, tags=tags)
        outcome = run(work, Judge(trial, job.settings.rungs(cell.max_steps)))
        outcomes.append(replace(outcome, job=job))
        trial.set_user_attr("run_id", outcome.run_id)
        if outcome.status == "PRUNED":
            raise optuna.TrialPruned
        if outcome.failure is not None:
            raise _CellFailedError(outcome.failure.message)
        return [outcome.metrics[metric] for metric, _ in OBJECTIVES[job.settings.objective]]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.optimize(objective, n_trials=1, catch=(_CellFailedError,))
    return outcomes[-1]


class Judge:
    """Decides at the rungs of a trial whether it goes on.

    Attributes:
        rungs: optimizer steps after which it wants the evaluation loss.
    """

    def __init__(self, trial: optuna.Trial, rungs: Sequence[int]):
        self._trial, self.rungs = trial, tuple(rungs)

    def __call__(self, step: int, loss: float) -> bool:
        """Takes the evaluation loss after a step; True: stop."""
        self._trial.report(loss, step)
        return self._trial.should_prune()


class _CellFailedError(RuntimeError):
    """The trial's cell failed; its run says why."""


def _axis(name: str, axis: Any, where: str) -> Any:
    """An axis with its values as the field has them.

    Raises:
        UserError: no field of that name, values that it cannot have, choices that repeat, a range that is none.
    """
    parser, where = Parser(CellConfig), f"{where}, search.space"
    if isinstance(axis, list) and axis:
        choices = [plain_values(parser.values({name: value}, where))[name] for value in axis]
        if len(set(choices)) < len(choices):
            raise UserError(f"{where}: {name} has a choice twice: {axis}.")
        return choices
    if not (isinstance(axis, Mapping) and {"low", "high"} <= set(axis) <= {"low", "high", "log", "step"}):
        raise UserError(f"{where}.{name} must be a list of choices, or a range with low and high.")
    parser.values({name: plain_values(CellConfig()).get(name)}, where)  # is there such a field at all?
    if not parser.is_number(name):
        raise UserError(f"{where}: {name} is no number, which alone has a range; give a list of choices.")
    if name == "sparsity":
        raise UserError(f"{where}.sparsity must be a list: masks are made for each level once.")
    if not isinstance(axis.get("log", False), bool):
        raise UserError(f"{where}: {name}.log is '{axis['log']}'; it must be true or false.")
    of, ends = (int if parser.is_count(name) else float), {}
    for end in ("low", "high", "step"):
        value = axis.get(end)
        if end == "step" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: {name}.{end} is '{value}'; it must be a number.")
        if of is int and value != int(value):
            raise UserError(f"{where}: {name}.{end} is {value}; it must be a whole number.")
        ends[end] = of(value)
        if end != "step":
            parser.values({name: ends[end]}, where)
    if not ends["low"] < ends["high"]:
        raise UserError(f"{where}: {name}: low must be below high; they are {ends['low']:g} and {ends['high']:g}.")
    if "step" in ends and (axis.get("log", False) or not 0 < ends["step"] <= ends["high"] - ends["low"]):
        raise UserError(f"{where}: {name}.step must be above 0 and fit into the range, and goes without log.")
    if axis.get("log", False) and ends["low"] <= 0:
        raise UserError(f"{where}: {name}: a logarithmic range begins above 0, not at {ends['low']:g}.")
    return {**ends, "log": axis.get("log", False)}
