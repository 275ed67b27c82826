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
from multiprocessing.connection import Connection, wait
from pathlib import Path

from sparse_ft.cell.failures import WorkerLostError
from sparse_ft.cores import cores
from sparse_ft.errors import masked
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.executors.pool import ProgressMessages, WorkerHandle, WorkerPool
from sparse_ft.study.jobs import Job
from sparse_ft.study.queue import Listener
from sparse_ft.study.worker import WorkerSetup

__all__ = ["ProcessExecutor", "default_workers", "start", "visible_gpus"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")


def default_workers(gpus_per_cell: int = 1) -> int:
    """As many as there are GPUs for; without one, a worker for every four cores, at least one."""
    gpus = len(visible_gpus())
    return max(1, gpus // gpus_per_cell if gpus else cores() // 4)


def visible_gpus() -> list[str]:
    """This process's GPUs, as ``CUDA_VISIBLE_DEVICES`` names them: numbers, or UUIDs where it was given those."""
    import torch

    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (given or [str(index) for index in range(count)])[:count]


def start(config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path) -> ProcessExecutor:
    """The executor as a configuration asks for it."""
    return ProcessExecutor(setup, listen, workers, config.cell_seconds, logs=logs)


class ProcessExecutor(WorkerPool):
    """Workers in processes of their own, which end with the driver, however it ends: none goes on logging behind
    its back.

    Args:
        setup: of every worker.
        listen: told what happens, in this process.
        workers: how many.
        cell_seconds: longest time for a cell; None for no limit.
        logs: folder for what the workers print.
        gpus: to be given out in turn, as many to a worker as a cell takes; by default `visible_gpus`.
    """

    exit_seconds = 30.0  # a busy machine takes its time to end a process with torch in it

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
        super().__init__(setup, listen, workers, cell_seconds)
        self._logs, self._gpus = logs, visible_gpus() if gpus is None else list(gpus)

    def _start(self, number: int) -> ProcessHandle:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads, CUDA and open databases
        here, there = spawn.Pipe()
        threads, log = max(1, cores() // self.workers), self._logs / f"worker-{number}.log"
        process = spawn.Process(
            target=_serve, args=(there, self._setup, threads, log), name=f"worker {number}", daemon=True
        )
        own = _surroundings(number, threads, self._gpus, self._setup.gpus_per_cell)
        with _environment(own):  # torch reads these when it is imported
            process.start()
        there.close()
        return ProcessHandle(process, here, log)

    def _wait(self, busy: Mapping[int, ProcessHandle]) -> None:
        deadlines = [handle.deadline for handle in busy.values() if handle.deadline is not None]
        wait(
            [handle.pipe for handle in busy.values()],
            max(0.0, min(deadlines) - time.monotonic()) if deadlines else None,
        )


class ProcessHandle(WorkerHandle):
    """The driver's end of one worker process: jobs and messages go through a pipe."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection, log: Path):
        super().__init__()
        self.process, self.pipe, self._log = process, pipe, log

    def send(self, job: Job) -> None:
        with suppress(OSError):  # it died in this moment: the pipe's end is read next
            self.pipe.send(job)

    def messages(self) -> Iterator[tuple]:
        try:
            while self.pipe.poll():
                yield self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            raise WorkerLostError(f"{self.process.name} is gone ({how}), see {self._log}") from None

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def dismiss(self) -> None:
        """It ends by itself when its pipe does, and cleans up what a killed one leaves behind."""
        self.pipe.close()

    def kill(self, after: float = 0) -> None:
        self.process.join(after)
        self.process.kill()
        self.process.join()
        self.pipe.close()


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

    progress = ProgressMessages(send)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            if worker is not None:
                worker.close()
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


def _surroundings(number: int, threads: int, gpus: Sequence[str], each: int = 1) -> dict[str, str]:
    """A worker's own environment: its threads, and its GPUs where there are any."""
    values = dict.fromkeys(_THREADS, str(threads))
    values["TOKENIZERS_PARALLELISM"] = "false"
    if gpus:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(number * each + k) % len(gpus)] for k in range(each))
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
