"""One trial of a search, where it runs: Optuna's proposal becomes a cell, its scores become the trial's values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from sparse_ft.cell.failures import Failure
from sparse_ft.cell.masks import mask_file
from sparse_ft.errors import UserError
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.parser import Parser
from sparse_ft.settings.search import SearchSettings
from sparse_ft.study.jobs import CellJob, Job, Outcome
from sparse_ft.tracking.record import Tag

__all__ = ["Judge", "TrialJob", "open_search", "open_storage", "propose"]

_HEARTBEAT, _GRACE = 10, 40  # seconds


@dataclass(frozen=True)
class TrialJob(Job):
    """Asks a worker to run the next trial as a cell, whatever Optuna proposes.

    Attributes:
        number: of this job in the study; makes its sampler's seed.
        cell: the values that no axis of the search sets.
        settings: of the search.
        storage: database of the trials.
        name: of the search in it.
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
        return f"trial {self.number}"

    def run(self, run: Callable[[Job], Outcome]) -> Outcome:
        """Takes the next trial from Optuna and runs it as a cell; the outcome is that of the cell's run."""
        study = open_search(self.storage, self.name, self.settings, self.number)
        outcomes: list[Outcome] = []

        def objective(trial: optuna.Trial) -> Sequence[float]:
            outcome = run(self._cell_job(trial))
            outcomes.append(replace(outcome, job=self))
            trial.set_user_attr("run_id", outcome.run_id)
            if outcome.status == "PRUNED":
                raise optuna.TrialPruned
            if outcome.failure is not None:
                raise _CellFailedError(outcome.failure.message)
            return [outcome.metrics[metric] for metric in self.settings.metrics]

        with _no_experimental_warnings():
            study.optimize(objective, n_trials=1, catch=(_CellFailedError,))
        return outcomes[-1]

    def _cell_job(self, trial: optuna.Trial) -> CellJob:
        cell = propose(trial, self.settings, self.cell)
        kind, masks = mask_set_of(cell), None
        if kind is not None:
            masks = self.masks[kind, cell.sparsity]
        elif cell.pruned:
            given = mask_file(cell.masks)
            cell, masks = given.settle(cell), given.file
        tags = {Tag.TRIAL: str(trial.number), Tag.SEARCH: self.name}
        key, judge = f"{self.name}-{trial.number}", Judge(trial, self.settings.rungs(cell.max_steps))
        return CellJob(cell, masks, self.folder / key, key=key, attempt=self.attempt, tags=tags, judge=judge)


def open_storage(storage: str) -> optuna.storages.RDBStorage:
    """The database of the trials, its tables made if need be; workers send heartbeats there.

    Raises:
        UserError: no driver, no database in reach, or one with the tables of another program.
    """
    try:
        with _no_experimental_warnings():
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
    seed = settings.seed + seed
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    with _no_experimental_warnings():
        if len(settings.metrics) > 1:
            size = max(4, settings.trials // 5)
            sampler: optuna.samplers.BaseSampler = optuna.samplers.NSGAIISampler(population_size=size, seed=seed)
        else:
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            if settings.first_rung:
                pruner = optuna.pruners.SuccessiveHalvingPruner(settings.first_rung, settings.reduction_factor)
        return optuna.create_study(
            storage=open_storage(storage),
            study_name=name,
            directions=settings.directions,
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


@contextmanager
def _no_experimental_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
