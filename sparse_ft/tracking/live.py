"""Points of a run's curves that reach the store while the work goes on.

MLflow's own asynchronous logging drops what its retries could not send. Here points wait for the store as long as the
work takes, with the times at which they were measured. What is sent twice is there once: the store knows a point by its
name, step, value and time.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from sparse_ft.errors import UserError
from sparse_ft.tracking.reading import NOT_THERE
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import reachable

__all__ = ["EVERY_SECONDS", "PATIENCE_SECONDS", "LivePoints", "UnsentError"]

EVERY_SECONDS = 10.0  # from one sending to the next
PATIENCE_SECONDS = 300.0  # that a store which is away has to come back, once the work is done
_INTERRUPTED_SECONDS = 2.0  # the same after Ctrl-C, or when the cell's time is up
_AGAIN_SECONDS = 2.0  # between two tries then
_BATCH = 1000  # points that one request takes


class UnsentError(UserError):
    """The store stayed away: some points are in a file only."""

    failure_class = "infrastructure"  # see `sparse_ft.cell.failures.classify`


class LivePoints:
    """Takes the points of a run and sends them from a thread, every few seconds; a context, at whose end all are sent.

    A store that does not answer costs the work nothing: points are kept, and sent when it is back. A sending is one
    request, and one more for every further thousand points, each after a question about the server's health.

    Args:
        tracker: of the run's store.
        run_id: whose points they are.
        unsent: the file for what could not be sent, a JSON object a line; made only then.
    """

    def __init__(self, tracker: Tracker, run_id: str, unsent: Path):
        self._tracker, self._run_id, self._unsent = tracker, run_id, unsent
        self._waiting: deque[tuple[str, float, int, int]] = deque()  # name, value, milliseconds since 1970, step
        self._taken: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._over, self._deadline = threading.Event(), math.inf
        self._thread: threading.Thread | None = None
        self._refusal: MlflowException | None = None
        self._error: Exception | None = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step, measured now. A point that is there already (a training that went back to a
        checkpoint) is left out, as is one that is not finite.

        Raises:
            MlflowException: the store has refused a point, such as one whose name it does not take.
        """
        if self._refusal is not None:
            raise self._refusal
        now = int(time.time() * 1000)
        with self._lock:
            new = {name: float(value) for name, value in values.items() if (name, step) not in self._taken}
            self._taken.update((name, step) for name in new)
            self._waiting.extend((name, value, now, step) for name, value in new.items() if math.isfinite(value))
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="live points", daemon=True)
            self._thread.start()

    def rest(self, curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
        """The points of these curves, metric -> [(step, value)], that it has not taken."""
        left = {n: [point for point in points if (n, point[0]) not in self._taken] for n, points in curves.items()}
        return {name: points for name, points in left.items() if points}

    def __enter__(self) -> LivePoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sends what is left.

        Raises:
            UnsentError: the store stayed away; where the work failed too, that is the error and this a line on stderr.
            MlflowException: the store has refused a point.
        """
        interrupted = error is not None and not isinstance(error, Exception)
        self._close(_INTERRUPTED_SECONDS if interrupted else PATIENCE_SECONDS)
        if self._refusal is not None and error is None:
            raise self._refusal
        if not self._waiting:
            return
        said = UnsentError(
            f"points of the run {self._run_id} could not be sent ({self._keep()}) and are in {self._unsent}: "
            f"{self._error or f'{self._tracker.uri} does not answer; bring it back'}"
        )
        if error is None:
            raise said from self._error
        print(said, file=sys.stderr)

    def _close(self, patience: float) -> None:
        if self._thread is not None:
            self._deadline = time.monotonic() + patience
            self._over.set()
            self._thread.join(patience + _AGAIN_SECONDS)  # a request that hangs is left to itself

    def _send_all(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self._send()
        while not self._send() and self._refusal is None and time.monotonic() < self._deadline:
            time.sleep(_AGAIN_SECONDS)

    def _send(self) -> bool:
        """Sends all that waits; whether nothing is left."""
        try:
            while self._waiting:
                with self._lock:
                    batch = list(islice(self._waiting, _BATCH))
                reachable(self._tracker.uri)  # mlflow itself would try for minutes before it gives up
                self._tracker.client.log_batch(self._run_id, metrics=[Metric(*point) for point in batch])
                with self._lock:
                    for _ in batch:
                        self._waiting.popleft()
            return True
        except Exception as error:
            self._error = error
            if isinstance(error, MlflowException) and error.error_code in NOT_THERE:
                self._refusal = error
            return False

    def _keep(self) -> int:
        """Writes the file of what was not sent; returns how many points that are."""
        with self._lock:
            points = list(self._waiting)
        self._unsent.parent.mkdir(parents=True, exist_ok=True)
        with open(self._unsent, "w", encoding="utf-8") as file:
            for name, value, when, step in points:
                entry = {"run_id": self._run_id, "metric": name, "step": step, "value": value, "timestamp": when}
                file.write(json.dumps(entry) + "\n")
        return len(points)
