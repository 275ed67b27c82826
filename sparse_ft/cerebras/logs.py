"""What ModelZoo's trainer prints, as numbers and as classes of failure. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RETRIED", "Failure", "Step", "classify_log", "job_ids", "parse_line"]

_STEP = re.compile(r"\| (Train|Eval) Device=\S+ Step=(\d+), (.*)")
_NUMBER = re.compile(r"(\w[\w/ ]*?)=([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))(?: samples/sec)?(?:,|$)", re.IGNORECASE)
_JOB = re.compile(r"\b(wsjob-[a-z0-9]{6,})")

# Class of failure -> how it shows. The first that is found counts, from the most telling to the most general.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("job_time_limit", ("JobTimeoutError", "job time limit", "exceeded the time limit", "job_time_sec")),
    ("disk_quota", ("Disk quota exceeded", "No space left on device", "errno 28", "errno 122", "[Errno 122]")),
    ("non_finite_loss", ("ApplianceNanError", "NaN loss", "loss is nan", "loss is inf", "NaN or inf")),
    ("cancelled", ("ClusterJobCancelledByCsctl", "JobCancelled", "was cancelled by csctl")),
    (
        "out_of_memory",
        ("ApplianceResourceExhausted", "ResourceExhausted", "Out of memory", "OOMKilled", "Cannot allocate memory"),
    ),
    (
        "lost_connection",
        (
            "ApplianceHealthPollException", "ApplianceServiceInterrupted", "Socket closed", "Connection reset by peer",
            "Broken pipe", "RST_STREAM", "ApplianceCorruptionError", "Connection aborted",
        ),
    ),
    (
        "cluster_unreachable",
        (
            "StatusCode.UNAVAILABLE", "failed to connect to all addresses", "Name or service not known",
            "No route to host", "Connection refused", "ClusterConfigError", "Could not find mgmt_address",
            "DNS resolution failed", "MissingVolumeError", "ClusterJobScheduleError", "config_v2",
        ),
    ),
    (
        "configuration_refused",
        (
            "validation error", "does not match any of the expected tags", "ValidationError", "UserError",
            "unrecognized arguments", "Failed to validate params", "Error(s) in loading state_dict",
            "ConfigConversionError", "FileNotFoundError", "is not available on this version",
        ),
    ),
    ("compile_failed", ("ApplianceCompilationError", "lowering failed", "Compilation failed")),
)  # fmt: skip

# Classes for which another try can end differently.
RETRIED = frozenset({"lost_connection"})


@dataclass(frozen=True)
class Step:
    """One line of progress: ``kind`` is ``Train`` or ``Eval``; ``rate`` counts samples per second over the run."""

    kind: str
    number: int
    loss: float | None
    rate: float | None


@dataclass(frozen=True)
class Failure:
    """Why a job ended: its class, and the line that tells."""

    kind: str
    message: str

    @property
    def retried(self) -> bool:
        """Whether another try can end differently."""
        return self.kind in RETRIED


def parse_line(line: str) -> Step | None:
    """The numbers of a progress line; None for any other line.

    The rate is the run's (``GlobalRate``): ``Rate`` is smoothed, and starts from a step that was not waited for.
    """
    match = _STEP.search(line)
    if match is None:
        return None
    kind, number, rest = match.groups()
    values = {key.strip(): float(value) for key, value in _NUMBER.findall(rest)}
    return Step(kind, int(number), values.get("Loss"), values.get("GlobalRate"))


def classify_log(lines: Sequence[str], exit_status: int) -> Failure:
    """The class of a failure from the last lines of a log and the exit status.

    One of configuration_refused, compile_failed, cluster_unreachable, lost_connection, disk_quota, job_time_limit,
    out_of_memory, non_finite_loss, cancelled, or trainer_failed.
    """
    for kind, signs in _SIGNS:
        for line in reversed(lines):
            if any(sign in line for sign in signs):
                return Failure(kind, _short(line))
    if exit_status in (-9, 137):
        return Failure("out_of_memory", "The trainer was killed (signal 9): this node's memory did not suffice.")
    told = [line for line in lines if re.match(r"\s*[\w.]+(Error|Exception)\b", line)]
    return Failure("trainer_failed", _short(told[-1] if told else (lines[-1] if lines else "no output")))


def job_ids(lines: Sequence[str]) -> list[str]:
    """The cluster's jobs that a log names, in order."""
    return list(dict.fromkeys(match for line in lines for match in _JOB.findall(line)))


def _short(line: str, most: int = 300) -> str:
    text = " ".join(line.split())
    return text if len(text) <= most else text[: most - 3] + "..."
