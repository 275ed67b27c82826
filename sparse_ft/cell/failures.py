"""Why a cell failed, as one of a few classes that decide what happens next."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_ft.errors import DataMissingError, ModelUnavailableError, UserError, masked

__all__ = [
    "BREAKS_WORKER",
    "NOT_THE_CELLS",
    "RETRIED",
    "RETRIED_AT_ONCE",
    "SETTLED",
    "CellTimeoutError",
    "Failure",
    "MemberLostError",
    "ValidationFailedError",
    "WorkerLostError",
    "classify",
    "parse_retry",
]

# Classes for which another try can end differently: when a study is resumed,
RETRIED = frozenset(
    {
        *("out_of_memory", "disk_full", "worker_lost", "timeout", "model_unavailable", "data_missing"),
        "infrastructure",
        *("cluster_unreachable", "lost_connection", "disk_quota", "job_time_limit", "cancelled"),  # of a Cerebras
    }
)
# and at once, without anybody having put something right.
RETRIED_AT_ONCE = frozenset({"out_of_memory", "worker_lost", "timeout", "infrastructure"})
# Those that are tried again only by whoever asks for it.
SETTLED = frozenset(
    {"non_finite_loss", "non_finite_scores", "validation_failed", "configuration", "bug", "trainer_failed"}
)
# After these the process that ran the cell is of no more use: a device's error stays until it ends.
BREAKS_WORKER = frozenset({"worker_lost"})
# These can be of the surroundings or of the worker itself: where one comes after the other, no cell is to blame.
NOT_THE_CELLS = frozenset({"bug", "worker_lost", "infrastructure"})

# What errors of libraries say, first match first: (class, what the text holds). Libraries in C++ and Rust, CUDA and
# databases report all of these as text only, and under many types.
_SAID = (
    ("disk_full", r"No space left on device|Disk quota exceeded|disk is full"),
    (
        "out_of_memory",
        r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    ),
    ("configuration", r"no kernel image is available|invalid device ordinal|not compiled with CUDA"),
    (
        "worker_lost",
        r"(CUDA|HIP|cuDNN|cublas|cusolver|cusparse|NCCL|Triton) ?(driver )?error|(CUDA|HIP|cuda|hip)(Error|_ERROR)|"
        r"CUDA (context|driver|unknown|initialization)|Triton Error \[|device-side assert|uncorrectable ECC|ECC error|"
        r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_|nccl\w*Error|ProcessGroupNCCL|illegal memory access|"
        r"unspecified launch failure|fallen off the bus|No CUDA GPUs are available",
    ),
    (
        "infrastructure",
        r"[Cc]onnection (was |is )?(refused|reset|aborted|timed out|closed)|closed the connection|"
        r"Connection broken|Remote end closed|could not connect to server|too many connections|remaining connection "
        r"slots|database (table )?is locked|disk I/O error|unable to open database file|[Ss]tale (NFS )?file handle|"
        r"Input/output error|os error (5|107|110|111|113|116)\)|Transport endpoint is not connected|No route to host|"
        r"Network is unreachable|[Nn]ame resolution|Name or service not known|[Rr]ead timed out|[Rr]ead ?[Tt]imeout|"
        r"Max retries exceeded|TEMPORARILY_UNAVAILABLE|REQUEST_LIMIT_EXCEEDED|(error code|HTTP Error|status|^) ?"
        r"(429|502|503|504)\b|Service Unavailable|Bad Gateway|Gateway Time-?out|Too Many Requests",
    ),
)
# Of errors of these kinds a text about a device is believed: one that only quotes it may be of any kind.
_DEVICE_ERRORS = (RuntimeError, AssertionError)
_NETWORK = tuple(
    number
    for name in (
        *("ESTALE", "EIO", "ENOTCONN", "EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETDOWN", "ENETRESET"),
        *("ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EPIPE", "EREMOTEIO", "ENOLCK", "ESHUTDOWN"),
    )
    if (number := getattr(errno, name, None)) is not None
)
# (package, name) of libraries' own types, so that none need be imported here; their subclasses too.
_INFRASTRUCTURE = {
    *(("requests", name) for name in ("ConnectionError", "Timeout", "ChunkedEncodingError", "RetryError")),
    *(("urllib3", name) for name in ("TimeoutError", "ProtocolError", "MaxRetryError", "NewConnectionError")),
    *(("sqlalchemy", name) for name in ("OperationalError", "TimeoutError")),
    *(("psycopg2", "OperationalError"), ("psycopg", "OperationalError"), ("pymysql", "OperationalError")),
    *(("httpx", "TransportError"), ("httpx2", "TransportError")),  # of the hub's clients, by their versions
    *(("botocore", "HTTPClientError"), ("filelock", "Timeout")),
    ("http", "IncompleteRead"),
}
_CODES = (  # of MLflow's own errors
    *("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR"),
    *("RESOURCE_EXHAUSTED", "WORKSPACE_TEMPORARILY_UNAVAILABLE", "SERVICE_UNDER_MAINTENANCE", "ABORTED"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRONG_QUERY = re.compile(r"no such (table|column)|syntax error|does not exist|has no column")


class ValidationFailedError(RuntimeError):
    """The merged checkpoint does not obey its mask."""


class WorkerLostError(RuntimeError):
    """The process that ran the cell is gone."""


class MemberLostError(WorkerLostError):
    """A process that ran the cell together with this one is gone."""

    keeps_process = True


class CellTimeoutError(BaseException):
    """The cell took longer than it may. No `Exception`, as KeyboardInterrupt is none: it comes in the middle of
    anything, and whoever handles all errors of a library's call must not take it for one of them.
    """


@dataclass(frozen=True)
class Failure:
    """One failed cell: its class, one line for the summary, and the whole traceback.

    ``keeps_process``: where the class says that its process can run no other cell, this one can.
    """

    kind: str
    message: str
    traceback: str
    keeps_process: bool = False


def classify(error: BaseException) -> Failure:
    """The failure class of an exception: one of `RETRIED` and `SETTLED`.

    A device's error (CUDA, ECC, NCCL) is ``worker_lost``, for its process can compute nothing more; what a store, a
    network or a file system that went away raises is ``infrastructure``. Of a Cerebras training the class is that of
    `sparse_ft.cerebras.logs.classify_log`.
    """
    text = masked("".join(traceback.format_exception(error)))
    message = masked(" ".join(f"{error}".split())) or type(error).__name__
    if isinstance(error, RuntimeError) and not isinstance(error, UserError) and len(message) > 300:
        message = message[:297] + "..."
    return Failure(_kind(error), message, text, getattr(error, "keeps_process", False))


def parse_retry(text: str | None) -> frozenset[str]:
    """Failure classes as people write them: ``none``, ``bug``, ``bug,validation_failed`` or ``[bug]``.

    Raises:
        UserError: there is no such class.
    """
    names = [name for name in re.split(r"[\s,\[\]'\"]+", text or "") if name and name != "none"]
    known = RETRIED | SETTLED
    for name in names:
        if name not in known:
            raise UserError(f"retry: there is no failure class '{name}'; there are {', '.join(sorted(known))}.")
    return frozenset(names)


def _kind(error: BaseException) -> str:
    classes = {
        ModelUnavailableError: "model_unavailable",
        DataMissingError: "data_missing",
        UserError: "configuration",
        ValidationFailedError: "validation_failed",
        WorkerLostError: "worker_lost",
        CellTimeoutError: "timeout",
    }
    if (told := getattr(error, "failure_class", None)) is not None:  # of training and scoring, here or on a Cerebras
        return told
    own = next((name for kind, name in classes.items() if isinstance(error, kind)), None)
    if own not in (None, "configuration"):
        return own
    wrapped = list(_causes(error))
    if own is not None:  # "cannot read FILE: MemoryError" is no fault of the configuration
        wrapped = wrapped[1:]
    return next((kind for cause in wrapped if (kind := _of_machine(cause)) is not None), own or "bug")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _of_machine(error: BaseException) -> str | None:
    """The class of an error of memory, disk, device, store or network; None for any other."""
    if isinstance(error, (MemoryError, *_of_torch("OutOfMemoryError"))):
        return "out_of_memory"
    if isinstance(error, OSError) and error.errno in _FULL:
        return "disk_full"
    if (said := _said(error)) is not None:
        return said
    return "infrastructure" if _of_surroundings(error) else None


def _said(error: BaseException) -> str | None:
    """The class that an error's text gives it."""
    message = str(error)
    of_device = isinstance(error, _DEVICE_ERRORS)
    for kind, signs in _SAID:
        if (kind in ("disk_full", "infrastructure") or of_device) and re.search(signs, message):
            return kind
    return "worker_lost" if isinstance(error, _of_torch("AcceleratorError")) else None


def _of_torch(name: str) -> tuple[type[BaseException], ...]:
    """The error class of torch of that name; none where torch was not imported, and so cannot have raised it."""
    found = getattr(sys.modules.get("torch"), name, None)
    return () if found is None else (found,)


def _of_surroundings(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _NETWORK:
        return True
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if getattr(error, "error_code", None) in _CODES:
        return True
    types = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(error).__mro__}
    return bool(types & _INFRASTRUCTURE) and _WRONG_QUERY.search(str(error)) is None
