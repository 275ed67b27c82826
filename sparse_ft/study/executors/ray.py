"""Workers as Ray Core actors: on this machine, or on every machine of a cluster.

Each actor is a `sparse_ft.study.worker.Worker` with one GPU (or its share of a machine's cores). The study's
folder and the tracking store must be reachable from every node: a shared file system and a server or database.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.cell.failures import CellTimeoutError, WorkerLostError, classify
from sparse_ft.errors import UserError
from sparse_ft.study.executors.process import Reporter
from sparse_ft.study.queue import Job, Listener, MaskJob, Queue, Work, breaks_worker
from sparse_ft.study.worker import WorkerSetup, close_lost
from sparse_ft.tracking.runs import Tracker

__all__ = ["RayExecutor", "cores_each"]

_EVERY = 0.5  # seconds between two looks at what the workers say


class RayExecutor:
    """Starts an actor per worker, gives each one job at a time, and replaces those that are lost with their node.

    Args:
        setup: of every worker.
        listen: told what happens, in this process.
        workers: how many.
        cell_seconds: longest time for a cell; None for no limit.
        address: of a running cluster (``auto`` finds the one this machine belongs to); ``none`` starts one here.

    Raises:
        UserError: ray is not installed, or nobody answers at the address.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        listen: Listener,
        workers: int,
        cell_seconds: float | None = None,
        address: str | None = None,
    ):
        self._ray = _ray()
        self._setup, self._listen, self._limit = setup, listen, cell_seconds
        self.workers = workers
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect(address)
        self._hands: list[_Hand | None] = [None] * workers
        self._tracker = Tracker(setup.tracking_uri)
        self._actor = self._remote()

    def run(self, queue: Queue) -> None:
        """Runs the queue empty."""
        while True:
            for number, hand in enumerate(self._hands):
                if hand is not None and hand.job is not None:
                    continue
                job = queue.take(number)
                if job is None:
                    continue
                hand = hand or _Hand(self._actor.remote(self._setup))
                self._hands[number] = hand
                hand.give(job)
                self._listen.started(number, job)
            busy = {number: hand for number, hand in enumerate(self._hands) if hand is not None and hand.job}
            if not busy:
                return
            self._make_room(busy)
            self._ray.wait([hand.result for hand in busy.values()], timeout=_EVERY)
            for number, hand in busy.items():
                self._look(queue, number, hand)

    def close(self) -> None:
        """Kills the actors, and leaves the cluster as it was."""
        for hand in self._hands:
            if hand is not None:
                self._ray.kill(hand.actor)
        self._hands = [None] * self.workers
        if self._ours:
            self._ray.shutdown()

    def _make_room(self, busy: Mapping[int, _Hand]) -> None:
        """Ends the workers that have nothing to do where others wait for a place: after a node was lost there may
        be fewer places than workers, and an idle one would keep its own until the study ends."""
        if all(hand.placed for hand in busy.values()):
            return
        for number, hand in enumerate(self._hands):
            if hand is not None and number not in busy:
                self._ray.kill(hand.actor)
                self._hands[number] = None

    def _look(self, queue: Queue, number: int, hand: _Hand) -> None:
        errors = self._ray.exceptions
        try:
            if self._ray.wait([hand.result], timeout=0)[0]:
                outcome = self._ray.get(hand.result)
                hand.job = None
                if breaks_worker(outcome):  # its context on the device is lost: the next cell gets a new actor
                    self._ray.kill(hand.actor)
                    self._hands[number] = None
                self._listen.ended(number, outcome, queue.settle(number, outcome))
                return
            self._hear(number, hand)
        except errors.RayError as error:
            # The job's own errors are outcomes: what is raised here is the worker's end.
            lost = MemoryError if isinstance(error, errors.OutOfMemoryError) else WorkerLostError
            self._lose(queue, number, hand, lost(f"worker {number} is gone: {str(error).splitlines()[0]}"))
            return
        over = hand.deadline is not None and time.monotonic() >= hand.deadline
        if over:
            self._lose(queue, number, hand, CellTimeoutError(f"the cell took longer than {self._limit:g} s"))

    def _hear(self, number: int, hand: _Hand) -> None:
        """What the actor has to say since the last look; it may be busy starting up."""
        if hand.news is None:
            hand.news = hand.actor.news.remote()
        if not self._ray.wait([hand.news], timeout=0)[0]:
            return
        messages, hand.news = self._ray.get(hand.news), None
        hand.placed = True
        for kind, *values in messages:
            if kind == "opened":
                hand.run_id = values[0]
                if self._limit is not None and not isinstance(hand.job, MaskJob):
                    hand.deadline = time.monotonic() + self._limit
            elif kind == "stage":
                self._listen.stage(number, *values)
            else:
                self._listen.advanced(number, *values)

    def _lose(self, queue: Queue, number: int, hand: _Hand, error: Exception) -> None:
        self._ray.kill(hand.actor)
        self._hands[number] = None
        run_id = hand.run_id or self._open_run(hand.job)
        seconds = time.monotonic() - hand.began
        failure = classify(error)
        outcome = close_lost(self._tracker, self._setup.parent_run_id, hand.job, run_id, failure, seconds)
        self._listen.ended(number, outcome, queue.settle(number, outcome))

    def _open_run(self, job: Work) -> str:
        """The run of a job whose worker was lost before it could say which: no two workers have the same job."""
        tag = "cell_key" if isinstance(job, Job) else "mask_key"
        for run in self._tracker.children(self._setup.parent_run_id, "RUNNING"):
            if run["tags"].get(tag) == job.key:
                return run["run_id"]
        return ""

    def _connect(self, address: str) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
        answers = False
        try:
            with _kept_sigterm():
                if address is None:  # "local": without it Ray joins any cluster that this machine remembers
                    self._ray.init(address="local", include_dashboard=False, **options)
                else:
                    answers = _listens(_resolved(address))
                    self._ray.init(address=address, **options)
        except OSError as error:  # ConnectionError is one
            why = str(error).splitlines()[0]
            raise UserError(
                f"ray_address: what answers at '{address}' cannot be joined ({why}). A cluster that asks for a token "
                "needs RAY_AUTH_MODE=token here too; otherwise its Ray may be of another version."
                if answers
                else f"ray_address: no Ray cluster answers at '{address}' ({why}); start one with ray start --head, "
                "or leave ray_address out."
            ) from None

    def _remote(self) -> Any:
        """The actor's class with what it asks of a node: a GPU where the cluster has any, else cores."""
        if self._ray.cluster_resources().get("GPU", 0) > 0:
            asked = {"num_gpus": 1, "num_cpus": 1}
        else:
            nodes = [node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]]
            asked = {"num_cpus": cores_each(nodes, self.workers)}
        threads = {"OMP_NUM_THREADS": str(asked["num_cpus"])} if "num_gpus" not in asked else {}
        surroundings = {"env_vars": {"TOKENIZERS_PARALLELISM": "false", **threads}}
        # Two threads: one works, one answers what has happened so far.
        remote = self._ray.remote(max_concurrency=2, max_restarts=0, runtime_env=surroundings, **asked)
        return remote(_Actor)


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself and ends the process; here it ends the study, in order."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _resolved(address: str) -> str:
    """What ``auto`` stands for, as Ray looks for it; empty where it would have to search."""
    if address != "auto":
        return address
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.is_file() else "")


def _listens(address: str) -> bool:
    """Whether something listens at ``host:port``; False where the address is not of that form. Raises OSError where
    nothing does: Ray itself would ask again for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return False
    socket.create_connection((host, int(port)), timeout=10).close()
    return True


@dataclass
class _Hand:
    """The driver's end of one actor."""

    actor: Any
    job: Work | None = None
    run_id: str = ""
    began: float = 0.0
    deadline: float | None = None
    result: Any = None
    news: Any = None
    placed: bool = False  # whether it has answered yet: Ray may still be looking for a place

    def give(self, job: Work) -> None:
        self.job, self.run_id, self.began, self.deadline = job, "", time.monotonic(), None
        self.news = None
        self.result = self.actor.run.remote(job)


class _Actor:
    """A worker in a process of its own, on whatever node Ray finds room."""

    def __init__(self, setup: WorkerSetup):
        self._setup = setup
        self._worker = None
        self._messages: deque[tuple] = deque()

    def run(self, job: Work) -> Any:
        """Runs one job; its failure is an outcome, not an error."""
        self._messages.clear()
        self._worker = self._worker or self._setup.build()
        say = self._messages.append
        return self._worker.run(job, Reporter(say), lambda run_id: say(("opened", run_id)))

    def news(self) -> list[tuple]:
        """What has happened since the last call."""
        return [self._messages.popleft() for _ in range(len(self._messages))]


def cores_each(nodes: Sequence[float], workers: int) -> int:
    """The most cores that each of so many workers can have; none is spread over two nodes. At least 1.

    Args:
        nodes: cores of each node.
    """
    for share in range(int(max(nodes, default=1)), 1, -1):
        if sum(cores // share for cores in nodes) >= workers:
            return share
    return 1


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("executor ray: ray is not installed; pip install 'sparse_ft[ray]'.") from None
    return ray
