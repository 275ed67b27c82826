"""What is read of a store: runs, curves, artifacts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from sparse_ft.errors import UserError
from sparse_ft.tracking.record import Run, Tag

__all__ = ["NOT_THERE", "Reader"]

NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # the person's, not the store's


class Reader:
    """The runs of a store. See `Tracker`, which makes one and also writes."""

    uri: str
    client: MlflowClient
    experiment_id: str

    def run(self, run_id: str) -> Run:
        """One run.

        Raises:
            UserError: there is no such run in the store.
        """
        try:
            return _record(self.client.get_run(run_id))
        except MlflowException as error:
            if error.error_code not in NOT_THERE:  # the store is away: no word on the run
                raise
            raise UserError(f"there is no run {run_id} in {self.uri}; is MLFLOW_TRACKING_URI right?") from error

    def children(self, parent_run_id: str, status: str | None = None) -> list[Run]:
        """All runs below a parent, oldest first; only those of one status (RUNNING, FINISHED, ...) if asked."""
        wanted = f" and attributes.status = '{status}'" if status else ""
        experiment = self.run(parent_run_id).experiment_id
        return self.search(f"tags.`{Tag.PARENT}` = '{parent_run_id}'{wanted}", experiment)

    def search(self, query: str = "", experiment_id: str | None = None) -> list[Run]:
        """All runs that a query in mlflow's search language finds, oldest first.

        Raises:
            UserError: a query that mlflow does not understand.
        """
        found: list[Run] = []
        token = None
        while True:
            try:
                page = self.client.search_runs(
                    [experiment_id or self.experiment_id],
                    query,
                    max_results=1000,
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
            except MlflowException as error:
                if error.error_code not in NOT_THERE:
                    raise
                raise UserError(f"cannot search runs for {query!r}: {error.message}") from error
            found += map(_record, page)
            token = page.token
            if not token:
                return found

    def experiment(self, name: str) -> str:
        """The id of an experiment that must be there, by its name or id.

        Raises:
            UserError: no such experiment; the message lists those there are.
        """
        known = {item.name: item.experiment_id for item in self.client.search_experiments()}
        if name in known or name in known.values():
            return known.get(name, name)
        raise UserError(f"there is no experiment '{name}' in {self.uri}; it has {', '.join(sorted(known)) or 'none'}")

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """All points of a metric of a run, by step."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    def artifacts(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of all artifacts of a run (files, not folders), or of those in one of its folders."""
        names: list[str] = []
        for item in self.client.list_artifacts(run_id, folder):
            names += self.artifacts(run_id, item.path) if item.is_dir else [item.path]
        return sorted(names)

    def fetch(self, run_id: str, name: str, folder: str | Path | None = None) -> Path:
        """The local path of an artifact (a file or a folder), downloaded where the store is not local.

        Args:
            run_id: whose.
            name: the artifact's path in the run.
            folder: where downloads go; by default a temporary folder, which is the caller's to remove.

        Raises:
            UserError: the run has no such artifact.
        """
        try:
            return Path(self.client.download_artifacts(run_id, name, folder and str(folder)))
        except (MlflowException, OSError) as error:
            raise UserError(f"run {run_id} has no artifact {name} that can be read: {error}") from error

    def fetch_text(self, run_id: str, name: str) -> str:
        """An artifact's text."""
        with tempfile.TemporaryDirectory() as scratch:
            return self.fetch(run_id, name, scratch).read_text(encoding="utf-8")


def _record(run: Any) -> Run:
    info, data = run.info, run.data
    return Run(
        run_id=info.run_id,
        name=info.run_name,
        status=info.status,
        parent_run_id=data.tags.get(Tag.PARENT),
        experiment_id=info.experiment_id,
        artifact_uri=info.artifact_uri,
        start_time=info.start_time / 1000,
        end_time=info.end_time / 1000 if info.end_time and info.status != "RUNNING" else None,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )
