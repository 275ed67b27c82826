"""A run's scores as those of its model, on the data that they were measured on: what the page Models shows."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.entities import Dataset, Metric
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from sparse_ft.tracking.runs import Tracker

__all__ = ["link_scores"]


def link_scores(tracker: Tracker, run_id: str, model_uri: str, measured_on: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Says of metrics that the run has already that they are the model's. Nothing is logged twice: MLflow knows a
    metric by its time and value.

    Args:
        tracker: where.
        run_id: the run that made the model.
        model_uri: what `sparse_ft.tracking.models.log_model` returned.
        measured_on: metric -> what the rows were used for on which it was measured, ``("evaluation",)``, and their task
            where several tasks' were used for that, ``("scored beside", "piqa")``; ``()``: on none, or on several.

    Returns:
        the metrics that the run has.
    """
    run, model_id = tracker.client.get_run(run_id), model_uri.removeprefix("models:/")
    data: dict[tuple[str, ...], Dataset] = {}
    for item in run.inputs.dataset_inputs if run.inputs is not None else ():
        said = next((tag.value for tag in item.tags if tag.key == MLFLOW_DATASET_CONTEXT), "")
        task = item.dataset.name.rpartition("/")[0]
        for context in said.split(", "):
            data |= {(context,): item.dataset, (context, task): item.dataset}
    metrics = []
    for metric in run.data._metric_objs:  # with their times, which `run.data.metrics` leaves out
        if metric.key in measured_on:
            known = data.get(measured_on[metric.key])
            about = {"dataset_name": known.name, "dataset_digest": known.digest} if known is not None else {}
            stamp = metric.key, metric.value, metric.timestamp, metric.step
            metrics.append(Metric(*stamp, model_id=model_id, run_id=run_id, **about))
    if metrics:
        tracker.client.log_batch(run_id, metrics=metrics)
    return [metric.key for metric in metrics]
