"""Who drives a study: a driver's heartbeat on the study's run, the signals that end it, and what it leaves behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from sparse_ft.errors import UserError
from sparse_ft.processes import is_alive, is_here
from sparse_ft.tracking.record import Run, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["HEARTBEAT_SECONDS", "TakenOverError", "close_open_runs", "driving", "interruptible", "living_driver"]

HEARTBEAT_SECONDS = 30  # how often a driver says on its run that it lives
_MISSED_BEATS = 3  # so many intervals without a heartbeat, and a driver counts as dead


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
        tracker.finish(child.run_id, "KILLED")


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
                if tracker.run(parent).driver != driver:
                    lost.set()
                    _interrupt()
                    return
                tracker.log(parent, tags={Tag.HEARTBEAT: time.time()})

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
    """Ends what the main thread is doing, as SIGTERM would: a signal wakes it up where it waits for its workers."""
    if callable(signal.getsignal(signal.SIGTERM)):  # that of `interruptible`, whose absence would end the process
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def living_driver(tracker: Tracker, run: Run) -> str | None:
    """Who drives a study now, in words; None: nobody.

    Of another place only the heartbeat tells. One that seems to have stopped is watched for more than an interval
    before it is believed: the clocks of two machines may differ.
    """
    if run.status != "RUNNING":
        return None
    name, beat = run.driver, _beat(run)
    since = datetime.fromtimestamp(run.start_time).strftime("%Y-%m-%d %H:%M:%S")
    host, number = (name.split(" ") + ["?", "?"])[:2]
    words = f"process {number} on {host}, since {since}"
    if is_here(name):
        return words if is_alive(name) else None
    if abs(time.time() - beat) < _MISSED_BEATS * HEARTBEAT_SECONDS:
        return words
    give_up = time.monotonic() + (1.5 * HEARTBEAT_SECONDS if beat else 0)
    while time.monotonic() < give_up:
        time.sleep(HEARTBEAT_SECONDS / 10)
        if _beat(tracker.run(run.run_id)) != beat:
            return words
    return None


def _beat(run: Run) -> float:
    try:
        return float(run.tags.get(Tag.HEARTBEAT, 0))
    except ValueError:
        return 0.0
