"""Persistent worker processes on this machine: one per GPU, or per group of cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from sparse_ft.cell.failures import CellTimeoutError, WorkerLostError, classify
from sparse_ft.cores import cores
from sparse_ft.errors import masked
from sparse_ft.progress import Progress
from sparse_ft.study.queue import Listener, MaskJob, Queue, Work, breaks_worker
from sparse_ft.study.worker import WorkerSetup, close_lost
from sparse_ft.tracking.runs import Tracker

__all__ = ["ProcessExecutor", "Reporter", "default_workers", "visible_gpus"]

_EXIT_SECONDS = 10.0  # seconds that a dismissed worker has to end
_EVERY = 0.2  # seconds between two reports of one worker's progress
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")


def default_workers() -> int:
    """As many as there are GPUs; without one, a worker for every four cores, at least one."""
    return len(visible_gpus()) or max(1, cores() // 4)


def visible_gpus() -> list[str]:
    """This process's GPUs, as ``CUDA_VISIBLE_DEVICES`` names them: numbers, or UUIDs where it was given those."""
    import torch

    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (given or [str(index) for index in range(count)])[:count]


class ProcessExecutor:
    """Starts workers when the first jobs come, gives each one job at a time, and replaces those that die.

    A worker's death (or its killing, when a cell takes too long) costs the cell it was at, nothing else.
    Workers end with the driver, however it ends: none goes on logging behind its back.

    Args:
        setup: of every worker.
        listen: told what happens, in this process.
        workers: how many.
        cell_seconds: longest time for a cell; None for no limit.
        logs: folder for what the workers print.
        gpus: to be given out in turn, one to a worker; by default `visible_gpus`.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        listen: Listener,
        workers: int,
        cell_seconds: float | None = None,
        *,
        logs: Path,
        gpus: Sequence[str] | None = None,
    ):
        self._setup, self._listen, self._limit, self._logs = setup, listen, cell_seconds, logs
        self._gpus = visible_gpus() if gpus is None else list(gpus)
        self.workers = workers
        self._hands: list[_Hand | None] = [None] * workers
        self._tracker = Tracker(setup.tracking_uri)

    def run(self, queue: Queue) -> None:
        """Runs the queue empty."""
        while True:
            for number, hand in enumerate(self._hands):
                if hand is not None and hand.job is not None:
                    continue
                job = queue.take(number)
                if job is None:
                    continue
                if hand is None or not hand.process.is_alive():  # it may have died while it had nothing to do
                    hand = self._hands[number] = self._start(number)
                hand.give(job)
                self._listen.started(number, job)
            busy = {number: hand for number, hand in enumerate(self._hands) if hand is not None and hand.job}
            if not busy:
                return
            self._wait(queue, busy)

    def close(self) -> None:
        """Ends the workers that have nothing to do, kills the others; the runs that those had open are the caller's
        to end (a worker may not get round to it)."""
        hands = [hand for hand in self._hands if hand is not None]
        for hand in hands:
            hand.dismiss()
        for hand in sorted(hands, key=lambda hand: hand.job is None):  # none works on while others are waited for
            hand.kill(after=_EXIT_SECONDS if hand.job is None else 0)
        self._hands = [None] * self.workers

    def _wait(self, queue: Queue, busy: Mapping[int, _Hand]) -> None:
        """Until something happens; then all that has happened."""
        clocks = [hand.deadline for hand in busy.values() if hand.deadline is not None]
        patience = max(0.0, min(clocks) - time.monotonic()) if clocks else None
        ready = wait([hand.pipe for hand in busy.values()], patience)
        for number, hand in busy.items():
            if hand.pipe in ready:
                try:
                    self._hear(queue, number, hand)
                except (EOFError, OSError):  # all it had said is heard; now it is gone
                    hand.process.join(10)
                    code = hand.process.exitcode
                    how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
                    error = WorkerLostError(f"worker {number} is gone ({how}), see {self._log(number)}")
                    self._lose(queue, number, hand, error)
            elif hand.deadline is not None and time.monotonic() >= hand.deadline:
                self._lose(queue, number, hand, CellTimeoutError(f"the cell took longer than {self._limit:g} s"))

    def _hear(self, queue: Queue, number: int, hand: _Hand) -> None:
        while hand.job is not None and hand.pipe.poll():
            kind, *values = hand.pipe.recv()
            if kind == "opened":
                hand.run_id = values[0]
                if self._limit is not None and not isinstance(hand.job, MaskJob):
                    hand.deadline = time.monotonic() + self._limit  # its start-up is not the cell's fault
            elif kind == "stage":
                self._listen.stage(number, *values)
            elif kind == "advanced":
                self._listen.advanced(number, *values)
            else:
                hand.job = hand.deadline = None
                if breaks_worker(values[0]):  # its context on the device is lost: the next cell gets a new process
                    hand.kill()
                    self._hands[number] = None
                self._listen.ended(number, values[0], queue.settle(number, values[0]))

    def _lose(self, queue: Queue, number: int, hand: _Hand, error: Exception) -> None:
        hand.kill()
        self._hands[number] = None
        seconds = time.monotonic() - hand.began
        failure = classify(error)
        outcome = close_lost(self._tracker, self._setup.parent_run_id, hand.job, hand.run_id, failure, seconds)
        self._listen.ended(number, outcome, queue.settle(number, outcome))

    def _start(self, number: int) -> _Hand:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads, CUDA and open databases
        here, there = spawn.Pipe()
        threads = max(1, cores() // self.workers)
        process = spawn.Process(
            target=_serve, args=(there, self._setup, threads, self._log(number)), name=f"worker-{number}", daemon=True
        )
        with _environment(_surroundings(number, threads, self._gpus)):  # torch reads these when it is imported
            process.start()
        there.close()
        return _Hand(process, here)

    def _log(self, number: int) -> Path:
        return self._logs / f"worker-{number}.log"


@dataclass
class _Hand:
    """The driver's end of one worker."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    job: Work | None = None
    run_id: str = ""
    began: float = 0.0
    deadline: float | None = None

    def give(self, job: Work) -> None:
        self.job, self.run_id, self.began, self.deadline = job, "", time.monotonic(), None
        with suppress(OSError):  # it died in this moment: the pipe's end is read next
            self.pipe.send(job)

    def dismiss(self) -> None:
        """A worker at rest ends by itself when its pipe does, and cleans up what a killed one leaves behind."""
        if self.job is None:
            self.pipe.close()

    def kill(self, after: float = 0) -> None:
        """Kills the worker if it has not ended ``after`` so many seconds."""
        self.process.join(after)
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Reporter(Progress):
    """Sends a worker's progress to the driver, a few times a second."""

    def __init__(self, send) -> None:
        self._send, self._sent, self._amount, self._note = send, 0.0, 0.0, ""

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self._amount, self._note = 0.0, ""
        self._send(("stage", stage, total, unit))

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._amount += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._sent >= _EVERY:
            self._send(("advanced", self._amount, self._note))
            self._sent, self._amount = now, 0.0

    def stop(self) -> None:
        self._send(("stage", "", 0, ""))


def _serve(pipe: Connection, setup: WorkerSetup, threads: int, log: Path) -> None:
    """A worker's life: jobs in, progress and outcomes out, until it is killed or its driver is gone."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers itself
    threading.Thread(target=_end_with_driver, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as stream:
        for shown in (sys.stdout, sys.stderr):
            os.dup2(stream.fileno(), shown.fileno())
    import torch

    torch.set_num_threads(threads)
    worker = None

    def send(message: tuple) -> None:
        try:
            pipe.send(message)
        except OSError:  # the driver is gone; as an error of the cell it would be logged as one
            os._exit(1)

    progress = Reporter(send)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            worker = worker or setup.build()
            outcome = worker.run(job, progress, lambda run_id: send(("opened", run_id)))
        except Exception:  # not of the cell, whose errors are outcomes: the worker itself is broken
            print(masked(traceback.format_exc()), file=sys.stderr, flush=True)
            os._exit(1)
        send(("ended", outcome))


def _end_with_driver() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _surroundings(number: int, threads: int, gpus: Sequence[str]) -> dict[str, str]:
    """A worker's own environment: its threads, and its GPU where there are any."""
    values = dict.fromkeys(_THREADS, str(threads))
    values["TOKENIZERS_PARALLELISM"] = "false"
    if gpus:
        values["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return values


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
