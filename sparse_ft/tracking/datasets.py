"""The inputs of a run as mlflow's datasets: what its pages show in the column Datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from sparse_ft.tracking.record import DataInput

__all__ = ["Rows", "dataset_inputs", "log_datasets"]

_NAME, _DIGEST = 500, 36  # characters that a store takes
_THERE_ALREADY = re.compile("unique constraint|duplicate", re.IGNORECASE)  # of SQLite and PostgreSQL, of MySQL too
_TRIES = 5


class Rows(MetaDataset):
    """Rows that somebody else holds: mlflow is told their name, digest, source, columns and number."""

    def __init__(self, data: DataInput):
        self._rows = data.rows
        columns = [ColSpec(_type(kind), name) for name, kind in data.columns.items()]
        schema = Schema(columns) if columns else None
        super().__init__(_source(data.source), name=data.name[:_NAME], digest=data.digest[:_DIGEST], schema=schema)

    @property
    def profile(self) -> dict[str, int] | None:
        """How many rows there are."""
        return None if self._rows is None else {"num_rows": self._rows}

    def to_dict(self) -> dict[str, str]:
        """As mlflow keeps it."""
        profile = {} if self.profile is None else {"profile": json.dumps(self.profile)}
        return super().to_dict() | profile


def dataset_inputs(inputs: list[DataInput]) -> list[DatasetInput]:
    """What one call of the store takes."""
    return [
        DatasetInput(Rows(data)._to_mlflow_entity(), [InputTag(MLFLOW_DATASET_CONTEXT, ", ".join(data.contexts))])
        for data in inputs
    ]


def log_datasets(client: MlflowClient, run_id: str, inputs: list[DatasetInput]) -> None:
    """Gives a run its inputs, in one call to the store.

    A store looks first which data sets it has and then writes the others: where another worker wrote the same one in
    between it refuses the whole call. It finds that one the next time.

    Args:
        client: of the store.
        run_id: of the run.
        inputs: of `dataset_inputs`, or those of another run.

    Raises:
        MlflowException: any other refusal.
    """
    for left in reversed(range(_TRIES)):
        try:
            return client.log_inputs(run_id, inputs)
        except MlflowException as error:
            if not left or not _THERE_ALREADY.search(str(error)):
                raise


def _source(place: Mapping[str, Any]) -> DatasetSource:
    if "repository" in place:
        return HuggingFaceDatasetSource(place["repository"], config_name=place["config"], split=place["split"])
    if "file" in place:
        return get_dataset_source_from_json(json.dumps({"uri": place["file"]}), "local")
    return CodeDatasetSource(dict(place))


def _type(kind: Any) -> DataType | Array | Object:
    if isinstance(kind, list):
        return Array(_type(kind[0]))
    if isinstance(kind, dict):
        return Object([Property(name, _type(inner)) for name, inner in kind.items()])
    return DataType[kind]
