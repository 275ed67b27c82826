"""A driver's life: signs that it lives, signals that end it, and what it leaves in order when it goes."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from sparse_ft.cell.failures import parse_retry
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.study.holder import HEARTBEAT_SECONDS
from sparse_ft.tracking.runs import Tracker

__all__ = ["TakenOverError", "close_open_runs", "driving", "interruptible", "resume_command"]


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


class TakenOverError(UserError):
    """Another driver has the study now: this one logs nothing more."""


@contextmanager
def driving(tracker: Tracker, parent: str, driver: str) -> Iterator[Callable[[], bool]]:
    """A study's run while ``driver`` drives it: with a heartbeat for other machines, ended when the block ends.

    A driver that stood still (a laptop asleep, a halted process) for so long that another one has taken its study
    over sees that at its next heartbeat, and ends without a word on the run, which is no longer its own. What is
    yielded says whether that has happened.

    Raises:
        TakenOverError: the run names another driver.
    """
    over, lost = threading.Event(), threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # a store that is away for a moment is no reason to stop
                if tracker.run(parent)["tags"].get("driver") != driver:
                    lost.set()
                    _interrupt()
                    return
                tracker.log(parent, tags={"heartbeat": time.time()})

    def taken_over() -> TakenOverError:
        return TakenOverError(
            f"the study {parent} was taken over by another driver while this one stood still; it goes on there, and "
            "ends here."
        )

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        with tracker.ending(parent, unless=lost.is_set):
            try:
                yield lost.is_set
            except BaseException:
                if lost.is_set():
                    raise taken_over() from None
                close_open_runs(tracker, parent)
                raise
            if lost.is_set():
                raise taken_over()
    finally:
        over.set()
        thread.join()


def _interrupt() -> None:
    """Ends what the main thread is at, as SIGTERM would: a signal wakes it up where it waits for its workers."""
    if callable(signal.getsignal(signal.SIGTERM)):  # that of `interruptible`, whose absence would end the process
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def resume_command(config: SweepConfig, parent: str, failed: Iterable[str] = ()) -> str:
    """The command that resumes a study; with the failure classes of its holes that must be asked for."""
    said = plain_values(config)
    values = {name: said[name] for name in ("config", "executor", "max_workers")}
    values |= {"resume": parent, "output_dir": config.output_dir}
    elsewhere = ("ray_address", "trainer", "cerebras")
    values |= {name: said[name] for name in elsewhere if getattr(config, name) is not None}
    if asked := parse_retry(config.retry) | ({"bug"} & set(failed)):
        values["retry"] = ",".join(sorted(asked))
    flags = " ".join(f"-P {name}={shlex.quote(str(value))}" for name, value in values.items())
    return f"mlflow run . -e sweep --env-manager local {flags}"
