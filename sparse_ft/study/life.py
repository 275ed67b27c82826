"""A driver's life: signs that it lives, signals that end it, and what it leaves in order when it goes."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sparse_ft.study.config import SweepConfig
from sparse_ft.study.resume import HEARTBEAT_SECONDS
from sparse_ft.tracking.runs import Tracker

__all__ = ["close_open_runs", "interruptible", "resume_command", "signs_of_life"]


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGTERM end a study as Ctrl-C does: what a batch system sends before it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def close_open_runs(tracker: Tracker, parent: str) -> None:
    """Sets KILLED what the stopped workers had open."""
    for child in tracker.children(parent, "RUNNING"):
        tracker.finish(child["run_id"], "KILLED")


@contextmanager
def signs_of_life(tracker: Tracker, parent: str) -> Iterator[None]:
    """Says on the study's run, every now and then, that its driver lives: other machines cannot see it otherwise."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # a store that is away for a moment is no reason to stop
                tracker.log(parent, tags={"heartbeat": time.time()})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def resume_command(config: SweepConfig, parent: str) -> str:
    """The command that goes on with a study."""
    values = {"config": config.config, "executor": config.executor, "max_workers": config.max_workers}
    values |= {"resume": parent, "output_dir": config.output_dir}
    elsewhere = {"ray_address": config.ray_address, "cerebras": config.cerebras}
    values |= {name: value for name, value in elsewhere.items() if value != "none"}
    flags = " ".join(f"-P {name}={shlex.quote(str(value))}" for name, value in values.items())
    return f"mlflow run . -e sweep --env-manager local {flags}"
