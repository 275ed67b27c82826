"""Runs: a parent, its children, and what they log. No active run, no global state: every call names its run."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from sparse_ft.errors import UserError, masked
from sparse_ft.tracking.notes import EXPERIMENT_NOTE, OURS
from sparse_ft.tracking.parameters import text_of
from sparse_ft.tracking.provenance import provenance
from sparse_ft.tracking.reading import Reader
from sparse_ft.tracking.record import ENDED, DataInput, Tag
from sparse_ft.tracking.stores import (
    artifact_location,
    exists,
    quiet_mlflow,
    reachable,
    store_lock,
    tracking_uri,
    unusable,
)
from sparse_ft.tracking.system_metrics import system_metrics

__all__ = ["Tracker"]

_BATCH = {"params": 100, "metrics": 1000, "tags": 100}  # what one log_batch takes
_BATCH_TOTAL = 1000
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000

Curve = Sequence[tuple[int, float]]


class Tracker(Reader):
    """An experiment in a tracking store.

    Cheap to make and safe in several processes at once: workers make their own from ``uri`` and the parent's
    run id. The store and the experiment are created if they are not there.

    Args:
        uri: the store; by default ``MLFLOW_TRACKING_URI``, else sqlite in the project root.
        experiment: its name; by default that of the run that ``mlflow run`` made for this process
            (``MLFLOW_RUN_ID``), or that ``mlflow.start_run()`` has around it, else ``MLFLOW_EXPERIMENT_NAME``, else
            ``sparse_ft``.

    Raises:
        UserError: the store cannot be reached or written, the run to adopt is not in it, or the experiment
            was deleted.
    """

    def __init__(self, uri: str | None = None, experiment: str | None = None):
        self.uri = tracking_uri(uri)
        reachable(self.uri)
        self._experiments: dict[str, str] = {}  # run id -> experiment id
        self._given: dict[str, set[str]] = {}  # run id -> parameters that `mlflow run` has logged
        self._said: dict[str, set[str]] = {}  # run id -> tags that it has set
        try:
            with quiet_mlflow(), store_lock(self.uri):
                self.client = MlflowClient(self.uri)
                adopted = _run_around()
                if experiment is None and adopted:
                    self.experiment_id = self._adopted(adopted)
                else:
                    name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sparse_ft"
                    self.experiment_id = self._ensure_experiment(name)
        except (MlflowException, SQLAlchemyError) as error:
            raise unusable(self.uri, error) from error

    @classmethod
    def of_existing(cls) -> Tracker | None:
        """The tracker of this process's store and experiment; None where they are not there yet. Creates nothing."""
        uri = tracking_uri()
        if not exists(uri):
            return None
        if not _run_around():
            reachable(uri)
            with quiet_mlflow(), store_lock(uri):
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sparse_ft"
                if MlflowClient(uri).get_experiment_by_name(name) is None:
                    return None
        return cls(uri)

    @classmethod
    def reading(cls, experiment: str | None = None, run_id: str | None = None) -> Tracker:
        """The tracker of an experiment that must be there (its name or id, or that of a run). Creates nothing.

        Raises:
            UserError: no such store, experiment or run; the message lists the experiments there are.
        """
        uri = tracking_uri()
        if not exists(uri):
            raise UserError(f"there are no runs yet in {uri}; is MLFLOW_TRACKING_URI right?")
        reachable(uri)
        try:
            with quiet_mlflow(), store_lock(uri):
                client = MlflowClient(uri)
                known = {item.experiment_id: item.name for item in client.search_experiments()}
                if run_id is not None:
                    try:
                        experiment = client.get_run(run_id).info.experiment_id
                    except MlflowException:
                        raise UserError(f"there is no run {run_id} in {uri}; is MLFLOW_TRACKING_URI right?") from None
        except (MlflowException, SQLAlchemyError) as error:
            raise unusable(uri, error) from error
        if experiment not in known and experiment not in known.values():
            names = ", ".join(sorted(known.values())) or "none"
            raise UserError(f"there is no experiment '{experiment}' in {uri}; it has {names}")
        adopted = _run_around()
        return cls(uri, None if adopted else experiment if experiment in known.values() else known[experiment])

    # -- runs

    @property
    def adopted(self) -> str | None:
        """The run that was there before us, which `start` takes; None: it makes one."""
        return _run_around()

    def start(self, name: str, tags: Mapping[str, Any] | None = None) -> str:
        """The id of this process's own run: the one ``mlflow run`` made for it, or a new one. It is RUNNING."""
        adopted = _run_around()
        self._describe_experiment(self.experiment_id, EXPERIMENT_NOTE)
        if not adopted:
            return self._create(self.experiment_id, name, tags or {})
        self._adopted(adopted)
        own = name if os.environ.get("MLFLOW_RUN_ID") else None  # somebody's own run keeps the name that he gave it
        self.client.update_run(adopted, status="RUNNING", name=own)
        # Of what `mlflow run` has said itself (project, user, commit) nothing is said otherwise.
        found = {name: value for name, value in provenance().items() if name not in self._said[adopted]}
        self.log(adopted, tags={**found, **(tags or {})})
        return adopted

    def beside(self, name: str, note: str) -> str:
        """The id of another experiment of this store, made with a note where it is not there."""
        experiment_id = self._ensure_experiment(name)
        self._describe_experiment(experiment_id, note)
        return experiment_id

    def start_in(self, experiment_id: str, name: str, tags: Mapping[str, Any] | None = None) -> str:
        """The id of a new run in an experiment."""
        return self._create(experiment_id, name, tags or {})

    def start_child(self, parent_run_id: str | None, name: str, tags: Mapping[str, Any] | None = None) -> str:
        """The id of a new run below ``parent_run_id``, in its experiment; without one, a run by itself."""
        if parent_run_id is None:
            return self._create(self.experiment_id, name, tags or {})
        if parent_run_id not in self._experiments:
            self._experiments[parent_run_id] = self.client.get_run(parent_run_id).info.experiment_id
        return self._create(self._experiments[parent_run_id], name, {**(tags or {}), Tag.PARENT: parent_run_id})

    def reopen(self, run_id: str) -> None:
        """Sets an ended run to RUNNING again: what resuming a study does to its parent.

        Raises:
            UserError: there is no such run in the store.
        """
        self.run(run_id)
        self.client.update_run(run_id, status="RUNNING")

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        if status not in ENDED:
            raise ValueError(f"{status} is not one of {', '.join(ENDED)}")
        self.client.set_terminated(run_id, status)

    def delete(self, run_id: str) -> None:
        """Marks a run as deleted; mlflow keeps it until ``mlflow gc``."""
        self.client.delete_run(run_id)

    @contextmanager
    def ending(self, run_id: str, unless: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Ends the run when the block ends: FINISHED, KILLED after Ctrl-C, FAILED after any other exception.

        Leaving through ``sys.exit(0)`` is an ordinary end. Where ``unless`` says so then, the run is left as it is.
        """
        try:
            yield run_id
        except BaseException as error:
            done = isinstance(error, SystemExit) and error.code in (None, 0)
            killed = isinstance(error, KeyboardInterrupt)
            if not unless():
                with suppress(Exception):  # a store that is away must not hide the error
                    reachable(self.uri)
                    self.finish(run_id, "FINISHED" if done else "KILLED" if killed else "FAILED")
            raise
        if not unless():
            self.finish(run_id)

    def system_metrics(self, run_id: str, seconds: float = 10, after: float = 0) -> AbstractContextManager[None]:
        """`sparse_ft.tracking.system_metrics.system_metrics` into a run of this store."""
        return system_metrics(self.uri, run_id, seconds, after)

    # -- what is logged

    def log(
        self,
        run_id: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        tags: Mapping[str, Any] | None = None,
        curves: Mapping[str, Curve] | None = None,
    ) -> None:
        """Logs all of it in one call to the store (in as few as its limits allow, where it is more).

        Args:
            run_id: whose.
            params: name -> value. Those that ``mlflow run`` logged as they were typed are left alone. Longer
                values than mlflow holds (6,000 characters) are cut: the whole is for an artifact.
            metrics: name -> number; None, NaN and infinities are not logged: what was not measured stays empty,
                and sqlite would hold 1.8e308 for an infinity.
            tags: name -> value; None is not logged.
            curves: name -> [(step, value), ...], steps as integers; the same of their values.
        """
        now = int(time.time() * 1000)
        given = self._given.get(run_id, set())
        points = [(name, value, 0) for name, value in (metrics or {}).items() if value is not None]
        points += [(name, value, step) for name, curve in (curves or {}).items() for step, value in curve]
        rest = {
            "params": [
                Param(name, _cut(text_of(value), _PARAM_LENGTH))
                for name, value in (params or {}).items()
                if name not in given
            ],
            "tags": [RunTag(name, value) for name, value in _plain_tags(tags or {}).items()],
            "metrics": [
                Metric(name, float(value), now, int(step)) for name, value, step in points if math.isfinite(value)
            ],
        }
        while any(rest.values()):
            batch: dict[str, list] = {}
            room = _BATCH_TOTAL
            for kind, entities in rest.items():
                count = min(len(entities), _BATCH[kind], room)
                batch[kind], rest[kind] = entities[:count], entities[count:]
                room -= count
            self.client.log_batch(run_id, **batch)

    def note(self, run_id: str, text: str) -> None:
        """Gives a run a note in Markdown; one that somebody else has written stays."""
        before = self.run(run_id).tags.get(Tag.NOTE)
        if not before or OURS in before:
            self.log(run_id, tags={Tag.NOTE: f"{_cut(text, _TAG_LENGTH - len(OURS) - 2)}\n\n{OURS}"})

    def log_inputs(self, run_id: str, inputs: Sequence[DataInput]) -> None:
        """Logs what a run looked at, in one call to the store."""
        if inputs:
            from sparse_ft.tracking.datasets import dataset_inputs, log_datasets  # what reading needs not of mlflow

            log_datasets(self.client, run_id, dataset_inputs(list(inputs)))

    def copy_inputs(self, run_id: str, other: str) -> None:
        """Gives a run the inputs of another, whose result it has."""
        found = self.client.get_run(other).inputs
        if found is not None and found.dataset_inputs:
            from sparse_ft.tracking.datasets import log_datasets

            log_datasets(self.client, run_id, found.dataset_inputs)

    def log_file(self, run_id: str, path: str | Path, folder: str | None = None) -> None:
        """Copies a file to the run's artifacts, under its own name."""
        self.client.log_artifact(run_id, str(path), folder)

    def log_folder(self, run_id: str, path: str | Path, folder: str | None = None) -> None:
        """Copies a folder's content to the run's artifacts."""
        self.client.log_artifacts(run_id, str(path), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Writes an artifact from a string, without the passwords in it; ``name`` may have folders in it."""
        self.client.log_text(run_id, masked(text), name)

    def log_dict(self, run_id: str, value: Any, name: str) -> None:
        """Writes an artifact from plain data, as YAML or JSON by its name's ending, without the passwords in it."""
        value = _masked_leaves(value)
        if name.endswith((".yaml", ".yml")):
            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        self.client.log_text(run_id, text, name)

    # -- inside

    def _create(self, experiment_id: str, name: str, tags: Mapping[str, Any]) -> str:
        run = self.client.create_run(experiment_id, run_name=name, tags=_plain_tags({**provenance(), **tags}))
        self._experiments[run.info.run_id] = experiment_id
        return run.info.run_id

    def _describe_experiment(self, experiment_id: str, note: str) -> None:
        """Says how to read an experiment, where nobody has said anything of it."""
        if Tag.NOTE not in self.client.get_experiment(experiment_id).tags:
            self.client.set_experiment_tag(experiment_id, Tag.NOTE.value, note)
            # Else the pages take it for one of agents, and call models their versions.
            self.client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")

    def _adopted(self, run_id: str) -> str:
        """The experiment of the run that ``mlflow run`` made; remembers which parameters it has already."""
        if run_id not in self._given:
            try:
                run = self.client.get_run(run_id)
            except MlflowException as error:
                if os.environ.get("MLFLOW_RUN_ID"):
                    raise UserError(
                        f"MLFLOW_RUN_ID names the run {run_id}, which is not in {self.uri}; give mlflow run an "
                        "absolute MLFLOW_TRACKING_URI, or unset MLFLOW_RUN_ID"
                    ) from error
                raise UserError(
                    f"the run {run_id} of mlflow.start_run() is not in {self.uri}; set MLFLOW_TRACKING_URI, so that "
                    "both are of one store"
                ) from error
            self._given[run_id], self._said[run_id] = set(run.data.params), set(run.data.tags)
            self._experiments[run_id] = run.info.experiment_id
        return self._experiments[run_id]

    def _ensure_experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location(self.uri, name))
            except MlflowException:  # somebody else made it in this moment
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"the experiment '{name}' was deleted; restore it (mlflow experiments restore -x "
                f"{found.experiment_id}) or choose another name"
            )
        return found.experiment_id


def _run_around() -> str | None:
    """The run that everything of this process belongs to: the one that ``mlflow run`` made for it, else the one that
    somebody has started around our code with ``mlflow.start_run()``."""
    if given := os.environ.get("MLFLOW_RUN_ID"):
        return given
    fluent = sys.modules.get("mlflow.tracking.fluent")
    active = fluent.active_run() if fluent is not None else None
    return active.info.run_id if active is not None else None


def _plain_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as mlflow takes them: plain strings, none too long. None is no value."""
    return {str(key): _cut(text_of(value), _TAG_LENGTH) for key, value in tags.items() if value is not None}


def _cut(text: str, length: int) -> str:
    text = masked(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def _masked_leaves(value: Any) -> Any:
    """Plain data with `masked` texts: after it was written as YAML a long text may stand on several lines."""
    if isinstance(value, Mapping):
        return {key: _masked_leaves(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked_leaves(inner) for inner in value]
    return masked(value) if isinstance(value, str) else value
