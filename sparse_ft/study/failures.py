"""Why a cell failed, as one of a few classes that decide what happens next."""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass

import torch

from sparse_ft.errors import DataMissingError, ModelUnavailableError, UserError
from sparse_ft.evaluation import NonFiniteScoresError
from sparse_ft.training import NonFiniteLossError

__all__ = [
    "RETRIED",
    "RETRIED_AT_ONCE",
    "CellTimeoutError",
    "Failure",
    "ValidationFailedError",
    "WorkerLostError",
    "classify",
]

# Classes for which another try can end differently: when a study is resumed,
RETRIED = frozenset(
    {
        *("out_of_memory", "disk_full", "worker_lost", "timeout", "model_unavailable", "data_missing"),
        *("cluster_unreachable", "lost_connection", "disk_quota", "job_time_limit", "cancelled"),  # of a Cerebras
    }
)
# and at once, without anybody having put something right.
RETRIED_AT_ONCE = frozenset({"out_of_memory", "worker_lost", "timeout"})
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ValidationFailedError(RuntimeError):
    """The merged checkpoint does not obey its mask."""


class WorkerLostError(RuntimeError):
    """The process that ran the cell is gone."""


class CellTimeoutError(RuntimeError):
    """The cell took longer than it may."""


@dataclass(frozen=True)
class Failure:
    """One failed cell: its class, one line for the summary, and the whole traceback."""

    kind: str
    message: str
    traceback: str


def classify(error: BaseException) -> Failure:
    """The failure class of an exception: out_of_memory, disk_full, non_finite_loss, non_finite_scores,
    data_missing, model_unavailable, worker_lost, timeout, validation_failed, configuration or bug; of a Cerebras
    training also those of `sparse_ft.cerebras.logs.classify_log`.
    """
    text = "".join(traceback.format_exception(error))
    message = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, RuntimeError) and not isinstance(error, UserError) and len(message) > 300:
        message = message[:297] + "..."
    return Failure(_kind(error), message, text)


def _kind(error: BaseException) -> str:
    classes = {
        ModelUnavailableError: "model_unavailable",
        DataMissingError: "data_missing",
        UserError: "configuration",
        NonFiniteLossError: "non_finite_loss",
        NonFiniteScoresError: "non_finite_scores",
        ValidationFailedError: "validation_failed",
        WorkerLostError: "worker_lost",
        CellTimeoutError: "timeout",
        MemoryError: "out_of_memory",
        torch.OutOfMemoryError: "out_of_memory",
    }
    if (told := getattr(error, "failure_class", None)) is not None:  # a Cerebras trainer's, from its own log
        return told
    for kind, name in classes.items():
        if isinstance(error, kind):
            return name
    message = str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        return "disk_full"
    # Libraries written in C++ and Rust, and sqlite, report these as text only.
    if any(sign in message for sign in ("No space left on device", "Disk quota exceeded", "disk is full")):
        return "disk_full"
    if isinstance(error, RuntimeError) and any(s in message for s in ("can't allocate memory", "not enough memory")):
        return "out_of_memory"
    return "bug"
