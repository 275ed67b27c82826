"""CPU, memory, disk, network and GPU use of this machine, logged to a run by MLflow's own monitor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

__all__ = ["system_metrics"]

_ENDING_SECONDS = 10.0  # for the last sample to be sent


@contextmanager
def system_metrics(uri: str, run_id: str, seconds: float = 10, after: float = 0) -> Iterator[None]:
    """Logs system metrics while the block runs, from a thread.

    A store that is away holds nothing up: MLflow tries each of its calls for minutes, and is left to do so.

    Args:
        uri: of the store.
        run_id: whose.
        seconds: from one sample to the next.
        after: a block that is over sooner, in seconds, costs nothing and logs nothing.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    begun: list[SystemMetricsMonitor] = []

    def begin() -> None:
        monitor = SystemMetricsMonitor(run_id, sampling_interval=seconds, tracking_uri=uri, resume_logging=True)
        monitor.start()
        begun.append(monitor)

    def end() -> None:
        timer.join()
        for monitor in begun:
            monitor.finish()

    timer = threading.Timer(after, begin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        ending = threading.Thread(target=end, name="end of system metrics", daemon=True)
        ending.start()
        ending.join(_ENDING_SECONDS)
