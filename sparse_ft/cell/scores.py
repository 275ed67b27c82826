"""A cell's models scored as the cell asks: untuned, in training, merged, re-masked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_ft.cell.group_model import GroupModel, on_all
from sparse_ft.cell.identity import cell_identity, untuned_key
from sparse_ft.cell.workbench import Workbench
from sparse_ft.evaluation import Evaluation, answer_loss, evaluate
from sparse_ft.evaluation.records import answer_row, first_filter
from sparse_ft.files import write_json, write_text
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import Progress
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import part_of
from sparse_ft.settings.scoring import ScoringSettings

__all__ = ["Scores"]


class Scores:
    """Scores a model as the cell asks.

    Args:
        cell: what is scored, and how.
        name: of its run, for the cells that take over an untuned score.
        bench: shares the scores of untuned models, shows progress.
        tokenizer, task: of the cell.
        folder: the cell's; answers that are kept go into its ``samples/``, every number of the tasks that are scored
            beside the cell's own into ``scores/``.

    Attributes:
        protocol: how the latest model was scored; empty until one was, by this cell.
        written: the files of both, each with the folder of the run's artifacts that it goes into; the cell's folder may
            hold an earlier cell's.
        tables: the answers as rows to read, by the name of the table among the run's artifacts.
        name: of the cell's run.
    """

    def __init__(self, cell: CellConfig, name: str, bench: Workbench, tokenizer, task, folder: Path):
        self._cell, self.name, self._bench, self._tokenizer, self._task = cell, name, bench, tokenizer, task
        self._suite = bench.suite(cell)
        self._folder = folder
        self.protocol: dict[str, Any] = {}
        self.written: list[tuple[Path, str]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def __call__(
        self, model: torch.nn.Module | GroupModel, stage: str, beside: bool = True, **changes: Any
    ) -> Evaluation:
        """All scores of a model; ``stage`` names it in the progress and in the file of its answers. Without ``beside``
        those on the cell's own task alone.

        Raises:
            NonFiniteScoresError: the model gives NaN or infinite logits.
        """
        progress = _Staged(self._bench.progress, stage)
        settings = replace(self._cell, **changes)
        suite = self._suite if beside else ()
        with on_all(model, "evaluate", settings=settings, beside=bool(suite)) as own:
            evaluation = evaluate(own, self._tokenizer, self._task, settings, progress, suite)
        self.protocol = evaluation.protocol
        stage = stage.replace(" ", "_")
        self._keep(evaluation.samples, stage)
        if (beside := evaluation.suite) is not None:
            for name, samples in beside.samples.items():
                self._keep(samples, f"{stage}.{name}")
            file = write_json(self._folder / "scores" / f"{stage}.json", beside.members)
            self.written.append((file, "scores"))
        return evaluation

    def _keep(self, samples: list[dict[str, Any]], name: str) -> None:
        if samples:
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            file = write_text(self._folder / "samples" / f"{name}.jsonl", "".join(lines))
            self.written.append((file, "samples"))
            self.tables[f"samples/{name}.json"] = [answer_row(sample) for sample in first_filter(samples)]

    def answers(self, model: torch.nn.Module | GroupModel) -> dict[str, float]:
        """The loss on the right answers alone."""
        progress = _Staged(self._bench.progress, "score adapter")
        with on_all(model, "answers", adapted=True, settings=self._cell) as own:
            return answer_loss(own, self._tokenizer, self._task, self._cell, progress)

    def untuned(self, model: PreTrainedModel | GroupModel, start: Checkpoint, checksum: str) -> tuple[str, Evaluation]:
        """The scores before training, and the name of the cell that measured them.

        Args:
            model: of the weights ``start``, under its masks.
            checksum: of the masks; empty where they leave the model as it is.
        """
        identity = cell_identity(self._cell, self._bench)
        key = untuned_key(
            self._cell, identity, start.fingerprint, checksum, part_of(ScoringSettings, self._cell.settled())
        )
        return self._bench.untuned(key, self.name, lambda: self(model, "score untuned"))


class _Staged(Progress):
    """Names the stages of a part after what the cell is doing with it."""

    def __init__(self, progress: Progress, stage: str):
        self._progress, self._stage = progress, stage

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self._progress.start(f"{self._stage}: {stage}", total, unit)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._progress.advance(amount, note)

    def stop(self) -> None:
        self._progress.stop()
