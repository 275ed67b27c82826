"""The kinds of job that a worker can be given, and how a job ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from sparse_ft.cell.early_stopping import Judge
from sparse_ft.cell.failures import BREAKS_WORKER, Failure
from sparse_ft.cell.record import log_cell_inputs, log_mask_inputs
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.lora import NEVER
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["CellJob", "Job", "MaskJob", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its run, the status in MLflow's words, and why it failed.

    ``masks`` are the files of a finished mask job, ``seconds`` the wall time at the worker.
    """

    job: Job
    run_id: str
    status: str
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    masks: tuple[MaskFile, ...] = ()

    @property
    def breaks_worker(self) -> bool:
        """Whether the process that ran the job can run no other."""
        return self.failure is not None and self.failure.kind in BREAKS_WORKER and not self.failure.keeps_process


class Job:
    """Anything that a worker can be given. Jobs are frozen dataclasses: they are sent to other processes.

    Attributes:
        key: its identity among the jobs of its kind.
        model: the base model, which a worker keeps in memory.
        title: a short name for people.
        attempt: 1 for the first.
        allowed: attempts that it may come to; None leaves that to the `Queue`.
        checksum: of the masks whose score before fine-tuning it shares with others.
        is_cell: whether it is a cell of the study: counted, and limited in time.
        kind: of its run.
        key_tag: the tag of its run that holds the key; empty where only the worker knows what the run will be.
        results_in_run: whether a FINISHED run holds all that came out.
    """

    key: str
    model: str
    title: str
    attempt: int
    allowed: int | None = None
    checksum: str | None = None
    is_cell: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.CELL
    key_tag: ClassVar[str] = ""
    results_in_run: ClassVar[bool] = False

    @property
    def run_tags(self) -> dict[str, object]:
        """The tags that its run begins with."""
        return {Tag.KIND: self.kind, self.key_tag: self.key, Tag.ATTEMPT: self.attempt}

    def log_inputs(self, tracker: Tracker, run_id: str, *, tags: Mapping[str, str] | None = None) -> None:
        """Logs what is asked for, and more ``tags``."""

    def run(self, run: Callable[[Job], Outcome]) -> Outcome:
        """Runs it at the worker; ``run`` runs a job as a run of its own."""
        return run(self)

    def again(self) -> Job:
        """The job for one more try."""
        return replace(self, attempt=self.attempt + 1)

    def halved(self) -> Job | None:
        """The job with less memory; None where there is no such."""
        return None

    def discard(self) -> None:
        """Removes what a failed try has written."""


@dataclass(frozen=True)
class CellJob(Job):
    """One cell to run, in a folder of its own.

    Attributes:
        cell: as it runs; after running out of memory its batch is smaller than the plan's.
        masks: None for a dense cell, and the failure to report where its masks could not be made.
        folder: for what the cell writes; removed when the run holds it.
        key: identity of the planned cell with its masks; see `sparse_ft.cell.identity.cell_key`.
        tags: more tags for the run.
        name: in its study; by default the cell's own.
        identity: what the cell's names stood for when it was planned; empty where nobody planned it.
        planned: the cell as the plan has it, where it runs otherwise.
        tuned: the run of the study's dense baseline, where that teaches.
        judge: of a search: decides midway whether the cell goes on. Only within the worker's process.
    """

    cell: CellConfig
    masks: MaskFile | Failure | None
    folder: Path
    key: str
    attempt: int = 1
    tags: Mapping[str, str] = field(default_factory=dict)
    allowed: int | None = None
    name: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    planned: CellConfig | None = None
    tuned: str = ""
    judge: Judge | None = None
    key_tag = Tag.CELL_KEY
    results_in_run = True

    @property
    def model(self) -> str:
        return self.cell.model

    @property
    def title(self) -> str:
        return self.name or self.cell.title

    @property
    def checksum(self) -> str | None:
        return self.masks.checksum if isinstance(self.masks, MaskFile) else None

    @property
    def mask_levels(self) -> Sequence[float]:
        """All levels of the mask set that its masks are of; empty where it has one."""
        return self.masks.metadata.get("levels", ()) if isinstance(self.masks, MaskFile) else ()

    @property
    def is_reduced(self) -> bool:
        """Whether its batch is smaller since a try ran out of memory."""
        return Tag.REDUCED_BATCH in self.tags

    @property
    def run_tags(self) -> dict[str, object]:
        return super().run_tags | dict(self.tags)

    def log_inputs(
        self,
        tracker: Tracker,
        run_id: str,
        identity: Mapping[str, str] | None = None,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Logs the cell and what its names stand for: ``identity``, or what they stood for when it was planned."""
        identity = self.identity if identity is None else identity
        log_cell_inputs(tracker, run_id, self.cell, identity, self.planned, tags, self.tuned, self.mask_levels)

    def halved(self) -> CellJob | None:
        """The job with half the batch and twice the accumulation (the same examples in every step), and no effective
        weights kept; None where that was done already or the batch is one."""
        cell, size = self.cell, self.cell.batch_size
        if self.is_reduced or size < 2:
            return None
        # Of an odd batch the largest part that leaves the optimizer's step as it was.
        smaller = max(part for part in range(1, size // 2 + 1) if size % part == 0)
        scored = cell.eval_batch_size
        cell = replace(
            cell,
            batch_size=smaller,
            gradient_accumulation=cell.gradient_accumulation * (size // smaller),
            eval_batch_size=max(1, scored // 2) if isinstance(scored, int) else scored,
            keep_effective=NEVER,
        )
        tags = {**self.tags, Tag.REDUCED_BATCH: f"{size} -> {smaller}"}
        return replace(self.again(), cell=cell, planned=self.planned or self.cell, tags=tags)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class MaskJob(Job):
    """One mask set to make: all levels of one kind of mask, into ``folder``."""

    config: MaskConfig
    name: str
    folder: Path
    key: str
    attempt: int = 1
    is_cell = False
    kind = Kind.MASKS
    key_tag = Tag.MASK_KEY

    @property
    def model(self) -> str:
        return self.config.model

    @property
    def title(self) -> str:
        return f"masks {self.name}"

    def log_inputs(self, tracker: Tracker, run_id: str, *, tags: Mapping[str, str] | None = None) -> None:
        log_mask_inputs(tracker, run_id, self.config, tags)
