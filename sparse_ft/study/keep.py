"""What of the models stays: the Pareto front whole, the rest as adapter and mask reference, rebuilt on demand."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparse_ft.analysis.performance import pareto_front as front_of
from sparse_ft.cell.rebuild import logged_cell, masks_of, not_of, rebuild
from sparse_ft.cell.register import register_cell
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.folder import is_packed
from sparse_ft.models.packing import pack_checkpoint, unpack_checkpoint
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.modes import MODES
from sparse_ft.tracking.record import Kind, Run, Tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["keep_models", "pareto_front"]


def pareto_front(runs: Sequence[Run]) -> list[Run]:
    """The cells that no other beats in both accuracy and sparsity of the merged model, sparsest first."""
    names = ("eval/accuracy", "sparsity/after_merge")
    scored = [run for run in runs if set(names) <= set(run.metrics)]
    points = np.array([[run.metrics[name] for name in names] for run in scored]).reshape(-1, 2)
    return [scored[number] for number in front_of(points[:, 0], points[:, 1])]


def keep_models(
    tracker: Tracker,
    parent: str,
    folder: Path,
    register: bool,
    bench: Workbench,
    front_only: bool = True,
    progress: Progress = SILENT,
    said: Callable[[str], None] = print,
    packed: bool = False,
) -> list[Path]:
    """Keeps whole models: those of the Pareto front of every model and task, or all of them.

    Args:
        tracker: where the runs are.
        parent: the study's run.
        folder: the study's; models go to ``folder/models``. One that has left the front since is removed: of
            the folders that runs of this study name as their own, and of no others.
        register: put them into the model registry, which then holds the only copy.
        bench: rebuilds them.
        front_only: keep the front; else every cell's model.
        progress: told how many.
        said: told why a model could not be kept, and of an alias that moved from another kind of model.
        packed: keep models without the weights that their masks prune; not in the registry.

    Returns:
        the folders or addresses of the models kept.
    """
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in tracker.children(parent):
        own = run.same_as is None and not run.is_superseded
        if run.kind == Kind.CELL and run.is_finished and own:
            groups[run.params.get("cfg/model", ""), run.params.get("cfg/task", "")].append(run)
    fronts = {key: pareto_front(runs) if front_only else runs for key, runs in groups.items()}
    kept: list[Path] = []
    progress.start("models of the front", sum(map(len, fronts.values())), "models")
    for key, runs in groups.items():
        chosen = {run.run_id for run in fronts[key]}
        for run in runs:
            if run.run_id not in chosen:
                _remove_model(tracker, run, folder)
                continue
            try:
                kept.append(_keep(tracker, run, folder, register, bench, said, packed))
            except (UserError, OSError) as error:
                said(f"{run.name} is on the Pareto front, but its model could not be kept: {error}")
            progress.advance(note=run.name)
    progress.stop()
    return kept


def _keep(
    tracker: Tracker,
    run: Run,
    folder: Path,
    register: bool,
    bench: Workbench,
    said: Callable[[str], None],
    packed: bool,
) -> Path:
    if registered := run.tags.get(Tag.REGISTERED_AS):
        return Path(registered)
    name = re.sub(r"[^\w.-]+", "-", run.name)
    target = folder / "models" / f"{name}-{run.run_id[:8]}"
    whole = folder / "cells" / run.cell_key / "merged"
    if not_of(run, target) is not None:  # absent, or left there by a start that was stopped or refused
        if not_of(run, whole) is None:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(whole, target)
        else:
            rebuild(tracker, run.run_id, target, bench)
    tracker.log(run.run_id, tags={Tag.MODEL_FOLDER: str(target.absolute())})
    if not register:
        if packed and not is_packed(target):
            _pack(tracker, run, target)
        return target
    if is_packed(target):
        unpack_checkpoint(target, target, in_place=True)
    cell = replace(logged_cell(tracker, run), register_as="auto")
    protocol = {k.removeprefix("protocol/"): v for k, v in run.params.items() if k.startswith("protocol/")}
    result = CellResult(metrics=run.metrics, protocol=protocol, tags=run.tags, merged=target)
    address = register_cell(tracker, run.run_id, cell, result, said=said, move=True)
    shutil.rmtree(target)
    tracker.log(run.run_id, tags={Tag.MODEL_FOLDER: ""})
    return Path(address)


def _pack(tracker: Tracker, run: Run, folder: Path) -> None:
    """Packs a model where it lies, if its zeros are those of its masks."""
    cell = logged_cell(tracker, run)
    if not MODES[cell.mode].keeps_zeros:
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = masks_of(tracker, run, cell, Path(scratch))
        if file is not None and file.pruned:
            pack_checkpoint(folder, file.load(), folder, in_place=True)


def _remove_model(tracker: Tracker, run: Run, folder: Path) -> None:
    """A model that left the front, or a whole checkpoint that waited to learn whether it is on it."""
    own = Path(run.tags.get(Tag.MODEL_FOLDER) or folder / "cells" / run.cell_key / "merged")
    if own.is_dir() and own.resolve().is_relative_to(folder.resolve()):
        shutil.rmtree(own)
        tracker.log(run.run_id, tags={Tag.MODEL_FOLDER: ""})
