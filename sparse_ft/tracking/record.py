"""A run as it is read back, and the names that runs are found by: their kinds and their tags, each written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sparse_ft.levels import level_label

__all__ = ["ENDED", "DataInput", "Kind", "Run", "Tag", "best_name", "by_level", "level_tag", "version_tag"]

ENDED = ("FINISHED", "FAILED", "KILLED")  # the statuses of a run that no worker has


class Kind(StrEnum):
    """What a run is, as its tag ``kind`` says it."""

    STUDY = "study"
    CELL = "cell"
    MASKS = "masks"
    STOPPED_TRIAL = "stopped trial"  # of a search; it has no scores
    CURVE = "curve"
    ANALYSIS = "analysis"
    VALIDATION = "validation"
    MEASUREMENT = "measurement"
    RESUME = "resume"  # what `mlflow run` made for a start that went on with a study


class Tag(StrEnum):
    """Names of tags. They stay as they are: runs that older versions logged are found by them."""

    KIND = "kind"
    PARENT = "mlflow.parentRunId"  # by which MLflow's pages nest runs
    COLOUR = "mlflow.runColor"
    # Where it was made, and how to make it again; see `version_tag` too.
    NOTE = "mlflow.note.content"  # in Markdown, above the run
    HOST = "host"
    DEVICE_NAME = "device_name"
    COMMAND = "command"  # that repeats this run alone
    # A study's: which plan, who drives it, where its files are, whether it has come to its end.
    PLAN_KEY = "plan_key"
    DRIVER = "driver"
    HEARTBEAT = "heartbeat"
    FOLDER = "folder"
    COMPLETE = "complete"
    RESUMES = "resumes"  # the study that a run of kind `resume` went on with
    # Which job a run is, and which worker ran it.
    CELL_KEY = "cell_key"
    MASK_KEY = "mask_key"
    CURVE_KEY = "curve_key"
    STEPS = "steps"  # of a curve: what they count; see `sparse_ft.levels.level_steps`
    ATTEMPT = "attempt"
    WORKER = "worker"
    REDUCED_BATCH = "reduced_batch"
    SEARCH = "search"
    TRIAL = "trial"
    # How it ended.
    FAILURE_CLASS = "failure_class"
    FAILURE_MESSAGE = "failure_message"
    KILLED_BECAUSE = "killed_because"
    STOPPED = "stopped"
    WARNING = "warning"
    # Which weights and masks it used and made, and where they are.
    BASE_FINGERPRINT = "base_fingerprint"
    HUB_COMMIT = "hub_commit"
    MASK_CHECKSUM = "mask_checksum"  # also level by level; see `level_tag`
    BLOCK_SPARSITY = "block_sparsity"  # only level by level: a JSON list, block by block
    RECONSTRUCTION_ERROR = "reconstruction_error"  # likewise: a JSON list of every block's error before and after
    MERGED_FINGERPRINT = "merged_fingerprint"
    MODEL_FOLDER = "model_folder"
    REGISTERED_AS = "registered_as"
    PUSHED_TO = "pushed_to"  # owner/name@commit of the hub
    VALID = "valid"
    UNTUNED_MEASURED_BY = "untuned_measured_by"
    RECOVERED_BY = "recovered_by"
    RECOVERED_FINGERPRINT = "recovered_fingerprint"
    TEACHER_FINGERPRINT = "teacher_fingerprint"  # of a teacher other than the model itself before it was pruned
    CEREBRAS_ATTEMPTS = "cerebras_attempts"
    CEREBRAS_JOBS = "cerebras_jobs"
    # What a result counts for.
    SAME_AS = "same_as"  # the run that computed it, under another name
    SUPERSEDED = "superseded"  # by cells of a later start, whose weights, rows or program are others
    BEST = "best"


@dataclass(frozen=True)
class DataInput:
    """Rows, or a text, that a run looked at.

    Attributes:
        name: as people know it: ``boolq/train``.
        digest: what tells its content from others of the name.
        contexts: what for: training, evaluation, few-shot, calibration, recovery, perplexity.
        source: ``file``, a path; or ``repository`` of the hub, its ``config`` and ``split``; or ``package``.
        rows: how many; None where nobody counted.
        columns: name -> ``string``, ``long``, ``double``, ``boolean``, ``[kind]`` or ``{name: kind}``.
    """

    name: str
    digest: str
    contexts: tuple[str, ...]
    source: Mapping[str, Any]
    rows: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a run has logged.

    Attributes:
        status: in MLflow's words: RUNNING, FINISHED, FAILED, KILLED, ...
        start_time, end_time: seconds since 1970; the latter None while it runs.
        params, tags: strings.
        metrics: last values.
    """

    run_id: str
    name: str = ""
    status: str = "RUNNING"
    parent_run_id: str | None = None
    experiment_id: str = ""
    artifact_uri: str = ""
    start_time: float = 0.0
    end_time: float | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """One of `Kind`; None of a run that somebody else made."""
        return self.tags.get(Tag.KIND)

    @property
    def is_finished(self) -> bool:
        return self.status == "FINISHED"

    @property
    def seconds(self) -> float | None:
        """How long it took; None while it runs."""
        return None if self.end_time is None else self.end_time - self.start_time

    @property
    def cell_key(self) -> str:
        """See `sparse_ft.cell.identity.cell_key`; empty where the run has none."""
        return self.tags.get(Tag.CELL_KEY, "")

    @property
    def same_as(self) -> str | None:
        """The run that computed this one's result under another name, where it is not its own."""
        return self.tags.get(Tag.SAME_AS)

    @property
    def is_superseded(self) -> bool:
        """Whether a later start of its study has put others in its place."""
        return Tag.SUPERSEDED in self.tags

    @property
    def driver(self) -> str:
        """Who drives, or drove, this study; see `sparse_ft.processes.driver_name`."""
        return self.tags.get(Tag.DRIVER, "")

    @property
    def folder(self) -> str:
        """Where this study's files are; empty where it has not said so."""
        return self.tags.get(Tag.FOLDER, "")


def level_tag(family: Tag, sparsity: float) -> str:
    """The tag of one level: ``mask_checksum_70`` of 0.7, ``block_sparsity_12.5`` of 0.125."""
    return f"{family}_{level_label(sparsity)}"


def by_level(tags: Mapping[str, str], family: Tag) -> dict[float, str]:
    """Sparsity -> value, of the tags that `level_tag` has named."""
    prefix = f"{family}_"
    return {float(name.removeprefix(prefix)) / 100: value for name, value in tags.items() if name.startswith(prefix)}


def version_tag(name: str) -> str:
    """The tag of a program's version: ``version/torch``."""
    return f"version/{name}"


def best_name(name: str) -> str:
    """The tag, or the metric, in which a search's run holds what its best trial had: ``best/lora_r``."""
    return f"{Tag.BEST}/{name}"
