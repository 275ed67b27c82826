"""Runs ModelZoo's trainer as a process, follows its log, and leaves no job behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_ft.cerebras.logs import Failure, Step, classify_log, job_ids, parse_line

__all__ = ["FitResult", "TrainerError", "fit_command", "run_fit", "trainer_environment"]

_KEPT_LINES = 400
_GRACE_SECONDS = 60  # for ModelZoo to cancel its job on SIGINT


class TrainerError(RuntimeError):
    """ModelZoo's trainer ended badly; ``failure`` says how."""

    def __init__(self, failure: Failure):
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure = failure
        self.failure_class = failure.kind  # what a study's summary calls it


@dataclass
class FitResult:
    """What a training printed.

    Attributes:
        steps: every line of progress, in order.
        checkpoint: the last checkpoint that was saved.
        attempts: trainings started, more than one where the connection was lost.
        jobs: the cluster's names of the jobs.
    """

    steps: list[Step] = field(default_factory=list)
    checkpoint: Path | None = None
    attempts: int = 0
    jobs: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        return [(step.number, step.loss) for step in self.steps if step.kind == "Train" and step.loss is not None]

    @property
    def rate(self) -> float | None:
        """Training samples per second over the whole run, as the trainer measured it."""
        rates = [step.rate for step in self.steps if step.kind == "Train" and step.rate is not None]
        return rates[-1] if rates else None


def fit_command(
    python: str, config: str | Path, device: str, labels: Sequence[str] = (), extra: Sequence[str] = ()
) -> list[str]:
    """The command line that trains ``config``; ``labels`` (``key=value``) go on the cluster's job."""
    command = [python, "-m", "sparse_ft.cerebras.modelzoo.cszoo", "fit", str(config), "--target_device", device, *extra]
    return [*command, "--job_labels", *labels] if labels and device == "CSX" else command


def trainer_environment(python: str, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for ``python``: its folder first on PATH, where ``torch-cirh-opt`` lies."""
    environment = dict(os.environ if base is None else base)
    environment["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment


def run_fit(
    command: Sequence[str],
    log: str | Path,
    model_dir: str | Path,
    on_step: Callable[[Step], None] = lambda step: None,
    retries: int = 2,
    environment: Mapping[str, str] | None = None,
) -> FitResult:
    """Runs a training to its end and returns what it printed; everything printed is in ``log``.

    A lost connection is tried again, from the last checkpoint that was saved. Ctrl-C, or any other exception,
    stops the trainer with SIGINT, on which ModelZoo cancels its job, and then cancels what is left by name.

    Args:
        command: `fit_command`.
        model_dir: the trainer's folder for checkpoints.
        on_step: called with every line of progress, as it comes.
        retries: further tries after a lost connection.

    Raises:
        TrainerError: with the class of the failure and the line that tells.
    """
    result = FitResult()
    while True:
        result.attempts += 1
        resume = _latest(model_dir) if result.attempts > 1 else None
        again = [*command, "--checkpoint_path", str(resume)] if resume else list(command)
        status, tail = _run_once(again, Path(log), result, on_step, environment)
        result.checkpoint = _latest(model_dir)
        if status == 0:
            return result
        failure = classify_log(tail, status)
        if not failure.retried or result.attempts > retries:
            raise TrainerError(failure)


def _run_once(
    command: Sequence[str],
    log: Path,
    result: FitResult,
    on_step: Callable[[Step], None],
    environment: Mapping[str, str] | None,
) -> tuple[int, list[str]]:
    tail: deque[str] = deque(maxlen=_KEPT_LINES)
    log.parent.mkdir(parents=True, exist_ok=True)
    with _heard_interrupts():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace", bufsize=1, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        with open(log, "a", encoding="utf-8") as file:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                tail.append(line.rstrip("\n"))
                result.jobs += [job for job in job_ids([line]) if job not in result.jobs]
                step = parse_line(line)
                if step is not None:
                    result.steps = [old for old in result.steps if (old.kind, old.number) != (step.kind, step.number)]
                    result.steps.append(step)
                    on_step(step)
        return process.wait(), list(tail)
    except BaseException:
        _stop(process, result.jobs)
        raise


@contextlib.contextmanager
def _heard_interrupts() -> Iterator[None]:
    """Processes started here obey SIGINT, even if this one ignores it, as all do that a shell starts with ``&``."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(process: subprocess.Popen, jobs: Sequence[str]) -> None:
    """Ends the trainer and its children, and cancels the cluster's jobs that its log named."""
    reader = threading.Thread(target=_drain, args=(process,), daemon=True)  # a full pipe would block its last words
    reader.start()
    for sign, seconds in ((signal.SIGINT, _GRACE_SECONDS), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    csctl = shutil.which("csctl")
    if csctl is not None:
        for job in jobs:
            subprocess.run([csctl, "cancel", "job", job], capture_output=True, check=False, timeout=60)


def _drain(process: subprocess.Popen) -> None:
    with contextlib.suppress(ValueError, OSError):
        for _ in process.stdout or ():
            pass


def _latest(model_dir: str | Path) -> Path | None:
    found = sorted(Path(model_dir).glob("checkpoint_*.mdl"), key=lambda path: (_number(path), path.stat().st_mtime))
    return found[-1] if found else None


def _number(path: Path) -> int:
    digits = path.stem.split("_")[1]
    return int(digits) if digits.isdigit() else -1
