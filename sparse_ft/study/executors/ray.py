"""Workers as Ray Core actors: on this machine, or on every machine of a cluster.

Each actor is a `sparse_ft.study.worker.Worker` with one GPU (or its share of a machine's cores). The study's
folder and the tracking store must be reachable from every node: a shared file system and a server or database.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_ft.cell.failures import WorkerLostError
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.executors.pool import ProgressMessages, WorkerHandle, WorkerPool
from sparse_ft.study.jobs import Job, Outcome
from sparse_ft.study.queue import Listener
from sparse_ft.study.worker import Worker, WorkerSetup

__all__ = ["RayExecutor", "cores_each", "start"]

_EVERY = 0.5  # seconds between two requests for the workers' messages


def start(config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path) -> RayExecutor:
    """The executor as a configuration asks for it."""
    return RayExecutor(setup, listen, workers, config.cell_seconds, address=config.ray_address)


class RayExecutor(WorkerPool):
    """Workers that are Ray actors, which may be lost with their node.

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
        super().__init__(setup, listen, workers, cell_seconds)
        self._ray = _ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect(address)
        self._asked = self._resources()

    def close(self) -> None:
        """Kills the actors, and leaves the cluster as it was."""
        super().close()
        if self._ours:
            self._ray.shutdown()

    def _start(self, number: int) -> ActorHandle:
        # Two threads: one works, one answers what has happened so far.
        remote = self._ray.remote(max_concurrency=2, max_restarts=0, **self._asked)(_Actor)
        place = None
        if (each := self._setup.gpus_per_cell) > 1:
            from sparse_ft.study.executors.ray_group import in_bundle

            bundle = {"CPU": self._asked["num_cpus"]} | ({"GPU": 1} if "num_gpus" in self._asked else {})
            place = self._ray.util.placement_group([bundle] * each, strategy="PACK")
            remote = remote.options(scheduling_strategy=in_bundle(place, 0))
        return ActorHandle(self._ray, remote.remote(self._setup, self._asked), number, place)

    def _wait(self, busy: Mapping[int, ActorHandle]) -> None:
        self._make_room(busy)
        self._ray.wait([handle.result for handle in busy.values()], timeout=_EVERY)

    def _make_room(self, busy: Mapping[int, ActorHandle]) -> None:
        """Ends the workers that have nothing to do where others wait for a place: after a node was lost there may
        be fewer places than workers, and an idle one would keep its own until the study ends."""
        if all(handle.placed for handle in busy.values()):
            return
        for number, handle in enumerate(self._handles):
            if handle is not None and number not in busy:
                self._drop(number)

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

    def _resources(self) -> dict[str, Any]:
        """What each process asks of a node: a GPU where the cluster has any, else cores.

        Raises:
            UserError: a cell takes more GPUs than there are.
        """
        gpus, each = self._ray.cluster_resources().get("GPU", 0), self._setup.gpus_per_cell
        if gpus > 0:
            asked = {"num_gpus": 1, "num_cpus": 1}
        else:
            nodes = [node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]]
            asked = {"num_cpus": cores_each(nodes, self.workers * each)}
        if 0 < gpus < each:
            raise UserError(f"gpus_per_cell is {each}, and the Ray cluster has {gpus:g} GPUs; lower it, or add nodes.")
        threads = {"OMP_NUM_THREADS": str(asked["num_cpus"])} if "num_gpus" not in asked else {}
        return asked | {"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false", **threads}}}


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


class ActorHandle(WorkerHandle):
    """The driver's end of one actor, which is asked for its messages.

    Attributes:
        result: reference to the outcome of its job.
        placed: whether it has answered yet: Ray may still be looking for a place.
    """

    def __init__(self, ray: Any, actor: Any, number: int, place: Any = None):
        super().__init__()
        self._ray, self._actor, self._number, self._place = ray, actor, number, place
        self._asked: Any = None
        self.result: Any = None
        self.placed = False

    def send(self, job: Job) -> None:
        self._asked, self.result = None, self._actor.run.remote(job)

    def messages(self) -> Iterator[tuple]:
        try:
            yield from self._received()
        except self._ray.exceptions.RayError as error:  # the job's own errors are outcomes
            lost = WorkerLostError(f"worker {self._number} is gone: {str(error).splitlines()[0]}")
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                lost.failure_class = "out_of_memory"
            raise lost from None

    def _received(self) -> Iterator[tuple]:
        if self._is_ready(self.result):
            yield "ended", self._ray.get(self.result)
            return
        self._asked = self._asked or self._actor.messages.remote()
        if self._is_ready(self._asked):  # it may be busy starting up
            messages, self._asked, self.placed = self._ray.get(self._asked), None, True
            yield from messages

    def dismiss(self) -> None:
        """It is killed."""

    def kill(self, after: float = 0) -> None:
        self._ray.kill(self._actor)
        if self._place is not None:  # and with it the rest of its group
            self._ray.util.remove_placement_group(self._place)

    def _is_ready(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])


class _Actor:
    """A worker in a process of its own, on whatever node Ray finds room."""

    def __init__(self, setup: WorkerSetup, asked: dict[str, Any]):
        self._setup, self._asked = setup, asked
        self._worker = None
        self._messages: deque[tuple] = deque()

    def run(self, job: Job) -> Outcome:
        """Runs one job; its failure is an outcome, not an error."""
        self._messages.clear()
        self._worker = self._worker or self._build()
        send = self._messages.append
        return self._worker.run(job, ProgressMessages(send), lambda run_id: send(("opened", run_id)))

    def _build(self) -> Worker:
        bench = Workbench(shared=self._setup.shared)
        if self._setup.gpus_per_cell > 1:
            from sparse_ft.study.executors.ray_group import RayLaunch

            bench.launch = RayLaunch(self._asked)
        return self._setup.build(bench)

    def messages(self) -> list[tuple]:
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
