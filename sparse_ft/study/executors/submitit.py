"""Workers as jobs of a SLURM cluster, submitted in arrays by submitit.

Driver and workers share no more than the study's folder, which every node must see: jobs and messages go through files
in it. A job is a worker for as long as the study lasts, or its time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparse_ft.cell.failures import WorkerLostError
from sparse_ft.cores import cores
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.executors.mailbox import Mailbox
from sparse_ft.study.executors.pool import ProgressMessages, WorkerHandle, WorkerPool
from sparse_ft.study.jobs import Job
from sparse_ft.study.queue import Listener, Queue
from sparse_ft.study.worker import WorkerSetup

__all__ = ["SubmititExecutor", "parameters", "problems", "serve", "start"]

_LOOK = 0.3  # seconds between two looks for jobs or messages
_SEND = 1.0  # seconds between two writes of a worker's messages
_BEAT = 10.0  # seconds between two signs of life, of driver and workers
_SILENT = 180.0  # seconds without one after which the other end is lost
_IDLE = 300.0  # seconds after which a worker without work gives its place back
_ASK = 2.0  # seconds between two questions about a job's state
_MINUTES = 1440  # of a worker, where nothing is said
_SHARED = ("name", "mem_gb", "cpus_per_task", "gpus_per_node")  # submitit's own words, for any cluster
# A worker is one process on one node, and prints into one file.
_OURS = ("nodes", "ntasks_per_node", "tasks_per_node", "num_gpus", "stderr_to_stdout")


def start(config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path) -> SubmititExecutor:
    """The executor as a configuration asks for it."""
    return SubmititExecutor(setup, listen, workers, config.cell_seconds, logs=logs, slurm=config.slurm or {})


def problems(config: SweepConfig) -> list[str]:
    """Why the executor cannot start, one line each."""
    try:
        cluster, _ = parameters(config.slurm or {})
    except UserError as error:
        return [str(error)]
    if cluster == "slurm" and shutil.which("srun") is None:
        return ["executor submitit: there is no SLURM here (no srun); submit from a machine of the cluster."]
    return []


def parameters(slurm: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is asked of the cluster, as submitit spells it; and the cluster: slurm, or local for this machine.

    Raises:
        UserError: submitit is not installed, or there is no such parameter.
    """
    known = ({*_SHARED} | _submitit().SlurmExecutor._valid_parameters()) - {*_OURS}
    asked = {"cluster": "slurm", "time": _MINUTES, **slurm}
    cluster, minutes = asked.pop("cluster"), asked.pop("time")
    if cluster not in ("slurm", "local"):
        raise UserError(f"slurm: cluster is '{cluster}'; it must be slurm | local.")
    if type(minutes) is not int or minutes < 1:
        raise UserError(f"slurm: time is '{minutes}'; it must be a whole number of minutes.")
    if unknown := sorted(asked.keys() - known):
        raise UserError(f"slurm: there is no parameter '{unknown[0]}'; there are {', '.join(sorted(known))}.")
    named = {name if name in _SHARED else f"slurm_{name}": value for name, value in asked.items()}
    more = named.pop("slurm_additional_parameters", None) or {}
    # Started again by the cluster itself, a worker would have no driver any more: its handle has another one by then.
    named["slurm_additional_parameters"] = {"no-requeue": True, **more}
    return cluster, {**named, "timeout_min": minutes, "stderr_to_stdout": True}


class SubmititExecutor(WorkerPool):
    """Workers that are jobs of a cluster, which may be lost with their node, be preempted or come to their time.

    Args:
        setup: of every worker.
        listen: told what happens, in this process.
        workers: how many.
        cell_seconds: longest time for a cell; None for no limit.
        logs: folder that all nodes see, for what the workers print, jobs and messages.
        slurm: what is asked of the cluster; see `parameters`.

    Raises:
        UserError: submitit is not installed, there is no SLURM here, or it has no such parameter.
    """

    exit_seconds = 30.0

    def __init__(
        self,
        setup: WorkerSetup,
        listen: Listener,
        workers: int,
        cell_seconds: float | None = None,
        *,
        logs: Path,
        slurm: Mapping[str, Any],
    ):
        super().__init__(setup, listen, workers, cell_seconds)
        submitit, (cluster, asked) = _submitit(), parameters(slurm)
        self._folder = logs.absolute() / "submitit"
        try:
            self._executor = submitit.AutoExecutor(self._folder, cluster=cluster)
            self._executor.update_parameters(**asked)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"executor submitit: {str(error).splitlines()[0]}") from None
        self._accounts = cluster == "local" or _keeps_accounts()
        self._submitted: list[SubmittedHandle] = []  # no worker number has them yet
        self._dismissed: list[SubmittedHandle] = []
        self._queue = Queue(())
        self._life = self._folder / f"driver-{uuid.uuid4().hex}"
        self._closing = threading.Event()

    def run(self, queue: Queue) -> None:
        """Runs the queue empty; its first workers are one array."""
        self._queue = queue
        super().run(queue)

    def close(self) -> None:
        """Ends the workers, those that SLURM has not started yet too."""
        super().close()
        for handle in (*self._submitted, *self._dismissed):
            handle.kill()
        self._closing.set()
        self._life.unlink(missing_ok=True)

    def _start(self, number: int) -> SubmittedHandle:
        if not self._submitted:
            others = [handle for handle in self._handles if handle is not None]
            there = sum(handle.job is not None or handle.is_alive() for handle in others)
            self._submit(max(1, min(self.workers, self._queue.left) - there))
        return self._submitted.pop(0)

    def _submit(self, count: int) -> None:
        if not self._life.exists():
            _beat(self._life)
            threading.Thread(target=_keep_beating, args=(self._life, self._closing), daemon=True).start()
        folders = [self._folder / f"worker-{uuid.uuid4().hex[:12]}" for _ in range(count)]
        for folder in folders:
            Mailbox(folder / "jobs").create()
            Mailbox(folder / "messages").create()
        try:
            jobs = self._executor.map_array(serve, [self._setup] * count, folders, [self._life] * count)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # in sbatch's own words
            raise UserError(f"executor submitit: the cluster refused the workers: {str(error)[-300:]}") from None
        self._submitted = [SubmittedHandle(*pair, self._accounts) for pair in zip(jobs, folders, strict=True)]

    def _wait(self, busy: Mapping[int, SubmittedHandle]) -> None:
        time.sleep(_LOOK)
        long_ago = time.monotonic() - _IDLE
        idle = [handle for handle in self._handles if handle is not None and handle.job is None]
        for handle in (*idle, *self._submitted):
            if handle.heard < long_ago:
                handle.dismiss()
                self._dismissed.append(handle)
        self._handles = [None if handle in self._dismissed else handle for handle in self._handles]
        self._submitted = [handle for handle in self._submitted if handle not in self._dismissed]


class SubmittedHandle(WorkerHandle):
    """The driver's end of one job: it is sent jobs, and sends messages, through two files.

    Args:
        submitted: the job, as submitit has it.
        folder: with the two files.
        accounts: whether the cluster can be asked what became of it; else only its messages, and silence, tell.

    Attributes:
        heard: when something came from it last, by the monotonic clock.
    """

    def __init__(self, submitted: Any, folder: Path, accounts: bool):
        super().__init__()
        self._submitted, self._accounts = submitted, accounts
        self._jobs, self._messages = Mailbox(folder / "jobs"), Mailbox(folder / "messages")
        self._begun, self._asked, self._forced, self._trouble = False, 0.0, 0.0, ""
        self.heard = time.monotonic()

    def send(self, job: Job) -> None:
        self.heard = time.monotonic()
        try:
            self._jobs.put([job])
        except OSError as error:  # such as a full disk: said where it is asked for messages
            self._trouble = str(error)

    def messages(self) -> Iterator[tuple]:
        gone = self._is_over()  # asked first, so that its last messages are read all the same
        for kind, *values in self._messages.take():
            self._begun, self.heard = True, time.monotonic()
            if kind == "gone":
                raise self._lost(*values)
            if kind != "alive":
                yield kind, *values
        if gone:
            raise self._lost(f"its state is {self._submitted.state}" if self._accounts else "it has ended")
        if self._trouble or (self._begun and time.monotonic() - self.heard > _SILENT):
            raise self._lost(self._trouble or "it shows no sign of life")

    def is_alive(self) -> bool:
        self._asked = 0.0
        try:
            for _ in self.messages():  # of an idle worker: signs of life
                pass
        except WorkerLostError:
            return False
        return True

    def dismiss(self) -> None:
        self._jobs.put([None])

    def kill(self, after: float = 0) -> None:
        """Takes the job from the cluster, whether it runs or waits for its turn."""
        give_up = time.monotonic() + after
        while not (done := self._is_done()) and time.monotonic() < give_up:
            time.sleep(_LOOK)
        if not done:
            self._submitted.cancel(check=False)

    def _is_over(self) -> bool:
        """Whether the cluster says so; it is asked now and then. A job may wait for its turn for days."""
        now = time.monotonic()
        if now - self._asked < _ASK:
            return False
        self._asked = now
        if force := self._begun and now - max(self.heard, self._forced) > 2 * _BEAT:
            self._forced = now
        return self._is_done(force)

    def _is_done(self, force: bool = False) -> bool:
        job = self._submitted
        return job.done(force_check=force) if self._accounts else job.paths.result_pickle.exists()

    def _lost(self, why: str) -> WorkerLostError:
        job = self._submitted
        lost = WorkerLostError(f"the job {job.job_id} is gone: {why}; see {job.paths.stdout}")
        if why.endswith("OUT_OF_MEMORY"):  # SLURM's word for a job that was killed for want of it
            lost.failure_class = "out_of_memory"
        return lost


def serve(setup: WorkerSetup, folder: Path, life: Path) -> None:
    """A worker's life, in a job of the cluster: jobs in, messages out, until it is dismissed, killed, or its driver
    shows no more signs of life.

    Args:
        setup: of the worker.
        folder: with its two files.
        life: the file in which its driver shows that it lives.
    """
    jobs, outgoing = Mailbox(folder / "jobs"), Mailbox(folder / "messages")
    if any(True for _ in outgoing.take()):
        return  # started again by the cluster, after its driver has given it up
    post = _Post(outgoing, life)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    for number in (signal.SIGTERM, signal.SIGUSR2):  # preempted, cancelled, or at the end of its time
        signal.signal(number, lambda number, frame: post.leave(f"{signal.Signals(number).name}, from the cluster"))
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores()))
    worker = None
    while True:
        for job in jobs.take():
            if job is None:
                return
            worker = worker or setup.build()
            outcome = worker.run(job, ProgressMessages(post.add), lambda run_id: post.add(("opened", run_id)))
            post.add(("ended", outcome))
            post.send()
        time.sleep(_LOOK)


class _Post:
    """Sends a worker's messages together, once a second, and signs of life between them; ends its process when the
    driver shows none."""

    def __init__(self, outgoing: Mailbox, life: Path):
        self._outgoing, self._life = outgoing, life
        self._waiting: list[tuple] = [("alive",)]
        self._lock = threading.RLock()
        self.send()
        threading.Thread(target=self._keep_sending, daemon=True).start()

    def add(self, message: tuple) -> None:
        with self._lock:
            self._waiting.append(message)

    def send(self) -> None:
        with self._lock:
            if self._waiting:
                self._outgoing.put(self._waiting)
                self._waiting = []

    def leave(self, why: str) -> None:
        """Ends the process, with its last word."""
        with suppress(OSError):
            self._outgoing.put([("gone", why)])  # alone: a signal may have come in the middle of sending the rest
        os._exit(1)

    def _keep_sending(self) -> None:
        seen, since, said = "", time.monotonic(), time.monotonic()
        while True:
            time.sleep(_SEND)
            now = time.monotonic()
            if now - said >= _BEAT:
                said = now
                self.add(("alive",))
                shown = _shown(self._life)
                if shown and shown != seen:
                    seen, since = shown, now
                elif now - since > _SILENT:
                    self.leave("its driver shows no sign of life")
            with suppress(OSError):  # the file system is away for a moment
                self.send()


def _keep_beating(life: Path, over: threading.Event) -> None:
    while not over.wait(_BEAT):
        with suppress(OSError):
            _beat(life)


def _beat(life: Path) -> None:
    life.parent.mkdir(parents=True, exist_ok=True)
    life.write_text(str(time.time()))


def _shown(life: Path) -> str:
    try:
        return life.read_text()
    except OSError:  # closed, or out of reach: it shows nothing
        return ""


def _keeps_accounts() -> bool:
    """Whether ``sacct``, which submitit asks, answers: SLURM runs without accounts too."""
    try:
        return subprocess.run(["sacct", "--noheader", "-j", "1"], capture_output=True).returncode == 0
    except OSError:
        return False


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("executor submitit: submitit is not installed; pip install 'sparse_ft[submitit]'.") from None
    return submitit
