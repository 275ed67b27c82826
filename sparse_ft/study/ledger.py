"""What the runs under a study's parent say: which cells are done, which failed and may be tried again."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparse_ft.errors import UserError
from sparse_ft.processes import is_alive, is_here
from sparse_ft.tracking.record import ENDED, Kind, Run, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["Ledger", "read_ledger"]

_EXIT_SECONDS = 30  # seconds that workers have to end after their driver


@dataclass
class Ledger:
    """What the runs under a parent say.

    Attributes:
        finished: cell key -> its FINISHED run.
        failed: cell key -> its FAILED runs, oldest first, where none is FINISHED.
        masks: mask key -> its FINISHED run.
        asked: failure classes that whoever resumes wants tried again, whatever they are.
        closed: open runs without a worker, which were set KILLED.
        cells: every run of a cell that has ended.
    """

    finished: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, list[Run]] = field(default_factory=dict)
    masks: dict[str, Run] = field(default_factory=dict)
    closed: list[Run] = field(default_factory=list)
    asked: frozenset[str] = frozenset()
    cells: list[Run] = field(default_factory=list)

    def has(self, key: str, params: Mapping[str, str]) -> bool:
        """Whether a cell of this key has a FINISHED run under these very names."""
        done = [run for run in self.cells if run.is_finished and run.cell_key == key]
        return any(params.items() <= run.params.items() for run in done)

    def failure_class(self, key: str) -> str | None:
        """The class in which the latest try of the cell failed."""
        runs = self.failed.get(key)
        return runs[-1].tags.get(Tag.FAILURE_CLASS) if runs else None

    def is_asked(self, key: str) -> bool:
        """Whether the cell failed in a class that whoever resumes wants tried again."""
        return self.failure_class(key) in self.asked

    def ran_out_of_memory(self, key: str) -> bool:
        """Whether the latest try of the cell ended for want of memory, with the batch the plan asks for."""
        out_of_memory = self.failure_class(key) == "out_of_memory"
        return out_of_memory and Tag.REDUCED_BATCH not in self.failed[key][-1].tags


def read_ledger(tracker: Tracker, parent: str) -> Ledger:
    """Reads the runs of a study, and sets open ones without a worker KILLED.

    Raises:
        UserError: one of its workers still lives.
    """
    ledger = Ledger()
    failed: dict[str, list[Run]] = defaultdict(list)
    for child in tracker.children(parent):
        if child.is_superseded:
            continue
        if child.status not in ENDED:
            _wait_for_end(child.tags.get(Tag.WORKER, ""))
            child = tracker.run(child.run_id)  # it may have come to its end in this moment
        if child.status not in ENDED:
            tracker.log(child.run_id, tags={Tag.KILLED_BECAUSE: "the study was stopped before the run had ended"})
            tracker.finish(child.run_id, "KILLED")
            ledger.closed.append(child)
        elif child.is_finished and child.kind == Kind.CELL:
            ledger.finished[child.cell_key] = child
            ledger.cells.append(child)
        elif child.is_finished and child.kind == Kind.MASKS:
            ledger.masks[child.tags.get(Tag.MASK_KEY, "")] = child
        elif child.status == "FAILED" and child.kind == Kind.CELL:
            failed[child.cell_key].append(child)
            ledger.cells.append(child)
    ledger.failed = {key: runs for key, runs in failed.items() if key not in ledger.finished}
    return ledger


def _wait_for_end(worker: str) -> None:
    """Workers end with their driver; one of this host that still does is waited for."""
    if not is_here(worker):
        return
    give_up = time.monotonic() + _EXIT_SECONDS
    while is_alive(worker):
        if time.monotonic() > give_up:
            number = worker.split(" ")[1]
            raise UserError(f"resume: process {number} still works for this study; end it first (kill {number}).")
        time.sleep(0.1)
