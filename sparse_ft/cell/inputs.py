"""The rows and texts that a cell, or masks, looked at: what each is called, where it came from, and its digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_ft.cell.workbench import Workbench
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.corpora import CORPORA, TASK
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.training_data import SOURCES, hub_name
from sparse_ft.tracking.record import DataInput

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["EVALUATION", "PERPLEXITY", "SCORED_BESIDE", "cell_inputs", "mask_inputs"]

EVALUATION, PERPLEXITY, SCORED_BESIDE = "evaluation", "perplexity", "scored beside"
_TEXT = {"text": "string"}


def cell_inputs(cell: CellConfig, identity: Mapping[str, str], bench: Workbench) -> list[DataInput]:
    """What a cell is trained and scored on, what its masks looked at, and what it recovers on.

    Args:
        cell: with its names.
        identity: what they stand for: its digests are those of the inputs.
        bench: holds the rows.
    """
    from sparse_ft.tasks.definitions import eval_split
    from sparse_ft.tasks.digests import scored_digests

    cell = cell.settled()
    task, found = bench.task(cell), []
    training, scored = task.config.training_split, eval_split(task)
    if MODES[cell.mode].trains:
        for source, what, context in zip(cell.sources, SOURCES, ("training", "mixed in"), strict=False):
            if source == TASK:
                found.append(_split(task, training, identity.get("training_data"), context))
            else:
                found.append(_own_rows(source, cell.data_dir, identity[what], bench, context))
    found.append(_split(task, scored, identity.get("scored_data"), EVALUATION))
    if "fewshot_data" in identity:
        shown = task.config.fewshot_split or training or scored
        found.append(_split(task, shown, identity["fewshot_data"], "few-shot"))
    for other in (other for item in bench.suite(cell) for other in item.tasks.values()):
        found.append(_split(other, eval_split(other), scored_digests(other).get("scored_data"), SCORED_BESIDE))
    if cell.pruned and cell.needs_calibration and cell.masks is None:
        rows = identity.get("training_data")
        found.append(_training_text(task, cell.calibration_corpus, cell.data_dir, rows, bench, "calibration"))
    if cell.recovered:
        rows = identity.get("training_data")
        found.append(_training_text(task, cell.recover_corpus, cell.data_dir, rows, bench, "recovery"))
    if cell.perplexity_tokens != 0:
        if cell.perplexity_corpus == TASK:
            found.append(_split(task, scored, identity.get("scored_data"), PERPLEXITY))
        else:
            found.append(_held_out_text(cell, identity["perplexity_text"]))
    return _merged(found)


def mask_inputs(config: MaskConfig, bench: Workbench) -> list[DataInput]:
    """The text that masks looked at, if they did."""
    if not config.needs_calibration:
        return []
    if config.calibration_corpus != TASK:
        return [_training_text(None, config.calibration_corpus, config.data_dir, None, bench, "calibration")]
    rows = bench.data_digests(config).get("training_data")
    return _merged([_split(bench.task(config), bench.task(config).config.training_split, rows, "calibration")])


def _split(task: Task, split: str | None, digest: str | None, context: str) -> DataInput | None:
    """The rows of a split, as lm-eval reads them; None where they have no digest, because there are none."""
    if split is None or digest is None:
        return None
    name, rows, source = task.config.task, task.dataset[split], task.config.metadata["source"]
    if source.startswith("hub:"):
        place = {"repository": source.removeprefix("hub:"), "config": task.config.dataset_name, "split": split}
    elif (folder := Path(source).expanduser()).is_dir():
        place = {"file": str(folder.absolute() / name / f"{split}.jsonl")}
    else:
        place = {"package": source}
    columns = {column: _kind(feature) for column, feature in rows.features.items()}
    return DataInput(f"{name}/{split}", digest, (context,), place, rows.num_rows, columns)


def _training_text(
    task: Task | None, corpus: str, data_dir: str | None, rows: str | None, bench: Workbench, context: str
) -> DataInput | None:
    """What calibration and recovery draw from: a corpus, or the training rows of the task, whose digest is ``rows``."""
    if corpus == TASK:
        return _split(task, task.config.training_split, rows, context)
    from sparse_ft.tasks.corpora import training_file

    found, file = bench.corpus(corpus, data_dir), training_file(corpus, data_dir)
    name = f"{corpus}/train" if corpus in CORPORA else Path(corpus).name
    return DataInput(name, found.digest, (context,), _place(corpus, file, "train"), len(found.rows), _TEXT)


def _own_rows(source: str, data_dir: str | None, digest: str, bench: Workbench, context: str) -> DataInput:
    """Rows of one's own: of a file, a folder, a corpus, or a data set of the hub."""
    from sparse_ft.tasks.corpora import training_file
    from sparse_ft.tasks.rows import COLUMNS

    rows = bench.rows(source, data_dir)
    if hub := hub_name(source):
        name, place = f"{hub[0]}/train", {"repository": hub[0], "config": hub[1], "split": "train"}
    else:
        name = f"{source}/train" if source in CORPORA else Path(source).name
        place = _place(source, training_file(source, data_dir), "train")
    return DataInput(name, digest, (context,), place, len(rows.rows), COLUMNS[rows.shape])


def _held_out_text(cell: CellConfig, digest: str) -> DataInput:
    """A corpus that perplexity reads. That of the hub is known by its name alone."""
    from sparse_ft.tasks.corpora import held_out_file

    corpus = cell.perplexity_corpus
    named = corpus in CORPORA
    file = held_out_file(corpus, cell.data_dir) if named else Path(corpus).expanduser()
    split = CORPORA[corpus].held_out if named else ""
    name = f"{corpus}/{split}" if named else file.name
    rows = None if file is None else _lines(file, digest)
    return DataInput(name, digest, (PERPLEXITY,), _place(corpus, file, split), rows, _TEXT)


@lru_cache(maxsize=64)
def _lines(file: Path, digest: str) -> int:
    """The lines of a file of this content: rows, where it holds any."""
    with open(file, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def _place(corpus: str, file: Path | None, split: str) -> dict[str, Any]:
    if file is not None:
        return {"file": str(file.absolute())}
    row = CORPORA[corpus]
    return {"repository": row.repository, "config": row.configuration, "split": split}


def _kind(feature: Any) -> Any:
    """A column of `datasets` in words: ``string``, ``long``, ``double``, ``boolean``, ``[kind]``, ``{name: kind}``."""
    if isinstance(feature, dict):
        return {name: _kind(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_kind(feature[0])]
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return [_kind(inner)]
    dtype = str(getattr(feature, "dtype", "string"))
    for begins, kind in (("int", "long"), ("uint", "long"), ("float", "double"), ("bool", "boolean")):
        if dtype.startswith(begins):
            return kind
    return "string"


def _merged(found: Iterable[DataInput | None]) -> list[DataInput]:
    """Each once: a store holds one entry for a run and rows, so what they were used for stands there together."""
    merged: dict[tuple[str, str], DataInput] = {}
    for data in found:
        if data is not None:
            key = data.name, data.digest
            before = merged[key].contexts if key in merged else ()
            merged[key] = replace(data, contexts=tuple(dict.fromkeys([*before, *data.contexts])))
    return list(merged.values())
