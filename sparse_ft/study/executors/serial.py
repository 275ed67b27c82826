"""Cells one after another, in the driver's own process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparse_ft.progress import Progress
from sparse_ft.study.worker import Job, Outcome, Worker

__all__ = ["run_serial"]


def run_serial(jobs: Sequence[Job], worker: Worker, progress: Progress) -> Iterator[Outcome]:
    """Runs the jobs in their order; yields each outcome as it comes."""
    for number, job in enumerate(jobs, 1):
        yield worker.run(job, _Numbered(progress, f"[{number}/{len(jobs)}] {job.cell.title}"))


class _Numbered(Progress):
    """Says which cell a stage belongs to, once, when the first stage of the cell starts."""

    def __init__(self, progress: Progress, title: str):
        self._progress, self._title = progress, title

    def start(self, stage: str, total: float, unit: str = "") -> None:
        if self._title:
            self._progress.say(self._title)
            self._title = ""
        self._progress.start(stage, total, unit)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._progress.advance(amount, note)

    def stop(self) -> None:
        self._progress.stop()
