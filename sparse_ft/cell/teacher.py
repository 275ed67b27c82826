"""Which model teaches a cell, and where its weights are."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import DENSE
from sparse_ft.tracking.record import Run, Tag

__all__ = ["check_teacher", "find_teacher", "teacher_fingerprint", "teacher_model"]


def find_teacher(cell: CellConfig, bench: Workbench, folder: Path, tuned: str = "") -> Checkpoint | None:
    """The weights that a cell learns from; None: it has no teacher.

    A run's model is made again, once for all cells that share a study's folder, of its adapter and the base model.

    Args:
        cell: whose teacher.
        bench: finds models; nobody has borrowed its own just now.
        folder: for a run's model, where nothing is shared.
        tuned: the run of the study's own dense baseline.

    Raises:
        UserError: a model or a run that cannot be had.
    """
    if not cell.has_teacher:
        return None
    if cell.teacher == DENSE.name:
        return bench.checkpoint(cell.model)
    run_id = tuned or cell.teacher_run
    return _made_again(run_id, bench, folder) if run_id else bench.checkpoint(cell.teacher)


def teacher_fingerprint(cell: CellConfig, bench: Workbench) -> str | None:
    """The fingerprint of a teacher that is named, a model or a run; None of any other.

    Raises:
        UserError: it cannot be had.
    """
    if not cell.has_teacher or not cell.names_teacher:
        return None
    if cell.teacher_run:
        return _run(cell.teacher_run, bench).tags[Tag.MERGED_FINGERPRINT]
    return bench.checkpoint(cell.teacher).fingerprint


def teacher_model(cell: CellConfig, bench: Workbench) -> str:
    """The model that a cell's teacher is, or was before it was tuned, by name.

    Raises:
        UserError: a run that cannot be had.
    """
    if not cell.names_teacher:
        return cell.model
    return _run(cell.teacher_run, bench).params["cfg/model"] if cell.teacher_run else cell.teacher


def check_teacher(cell: CellConfig, bench: Workbench) -> None:
    """Whether a teacher that is named can teach the cell's model.

    Raises:
        UserError: it cannot be had, has another vocabulary, or, for SquareHead, other blocks.
    """
    if not cell.has_teacher or not cell.names_teacher:
        return
    name = cell.teacher
    try:
        model = teacher_model(cell, bench)
        own, other = bench.checkpoint(cell.model), bench.checkpoint(model)
        vocabularies = [bench.tokenizer(one).get_vocab() for one in (cell.model, model)]
    except UserError as error:
        raise UserError(f"teacher: {error}") from error
    if vocabularies[0] != vocabularies[1] or own.config["vocab_size"] != other.config["vocab_size"]:
        raise UserError(f"teacher {name} has another vocabulary than {cell.model}; take one with the same tokenizer.")
    for what, words in (("num_hidden_layers", "blocks"), ("hidden_size", "hidden channels")):
        if cell.teacher_squarehead and own.config[what] != other.config[what]:
            raise UserError(
                f"teacher {name} has {other.config[what]} {words}, {cell.model} {own.config[what]}: SquareHead compares"
                " block by block. Set teacher_squarehead to 0, or take another teacher."
            )


def _run(run_id: str, bench: Workbench) -> Run:
    from sparse_ft.cell.rebuild import finished_cell
    from sparse_ft.tracking.runs import Tracker

    tracker = Tracker(bench.store) if bench.store else Tracker.reading(run_id=run_id)
    return finished_cell(tracker, run_id)[0]


def _made_again(run_id: str, bench: Workbench, folder: Path) -> Checkpoint:
    from sparse_ft.cell.rebuild import not_of, rebuild
    from sparse_ft.tracking.runs import Tracker

    run = _run(run_id, bench)
    place = (bench.teachers or folder / "teachers") / run.tags[Tag.MERGED_FINGERPRINT]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # whoever comes second waits, which takes no longer than to make it again
        if not_of(run, place) is not None:
            shutil.rmtree(place, ignore_errors=True)
            tracker = Tracker(bench.store) if bench.store else Tracker.reading(run_id=run_id)
            rebuild(tracker, run.run_id, place, bench)
    return Checkpoint(place)
