"""What of the models stays: the Pareto front whole, the rest as adapter and mask reference, rebuilt on demand."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from peft import PeftModel

from sparse_ft.analysis.performance import pareto_front as front_of
from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder
from sparse_ft.levels import level_label
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import load_sparse_lora
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_state_into, save_model, saved_tokenizer
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.study.cell import CellResult
from sparse_ft.study.config import CellConfig
from sparse_ft.study.mask_sets import mask_file, read_manifest
from sparse_ft.study.plan import make_cell
from sparse_ft.study.registering import register_cell
from sparse_ft.study.workbench import Workbench
from sparse_ft.tracking.runs import Tracker

__all__ = ["keep_models", "pareto_front", "rebuild"]

Run = dict[str, Any]


def rebuild(tracker: Tracker, run_id: str, target: Path, bench: Workbench) -> Path:
    """Makes a cell's merged checkpoint again, bit for bit, from its adapter and its masks.

    The result is compared with the fingerprint that the run holds: on another kind of device the last bit of a
    matrix product may differ, and then it is said instead of passed over.

    Args:
        tracker: where the run is.
        run_id: of a FINISHED cell; one that is the ``same_as`` of another gives that one's model.
        target: the new checkpoint's folder.
        bench: finds and loads the base model.

    Raises:
        UserError: no such run, no adapter or masks any more, or weights that came out otherwise.
    """
    run = tracker.run(run_id)
    if run["tags"].get("same_as"):
        run = tracker.run(run["tags"]["same_as"])
    if run["tags"].get("kind") != "cell" or run["status"] != "FINISHED":
        raise UserError(f"run {run_id} is no finished cell ({run['status']}); there is nothing to rebuild.")
    with tempfile.TemporaryDirectory() as scratch:
        cell = replace(_cell(tracker, run), output_dir=scratch)
        if not any(name.startswith("adapter/") for name in tracker.artifacts(run["run_id"])):
            raise UserError(f"run {run_id} holds no adapter (mode {cell.mode}, keep: none); run the cell again.")
        adapter = tracker.fetch(run["run_id"], "adapter", scratch)
        masks = _masks(tracker, run, cell, Path(scratch))
        base, found = run["tags"].get("base_fingerprint"), bench.checkpoint(cell.model)
        if not found.is_called(base):
            raise UserError(
                f"{cell.model} has other weights now ({found.fingerprint}) than run {run['run_id']} used ({base})."
            )
        with bench.borrow(cell) as model:
            if masks is not None and masks.checkpoint is not None:
                start = Checkpoint(masks.checkpoint)
                load_state_into(model, start, start.prunable)
            if masks is None:
                adapted = PeftModel.from_pretrained(model, str(adapter))
            else:
                adapted = load_sparse_lora(model, adapter, masks.load())
            with atomic_folder(target) as made:
                merged = merge_all_lora_weights(adapted, cell.rounding, cell.seed)
                save_model(merged, saved_tokenizer(bench.checkpoint(cell.model).folder), made)
                if (problem := _not_of(run, made)) is not None:
                    raise UserError(f"{problem}; rebuild on the kind of device that the cell ran on. Nothing is kept.")
    return target


def _not_of(run: Run, folder: Path) -> str | None:
    """Why a checkpoint is not the merged model of a run; None where it is."""
    expected = run["tags"].get("merged_fingerprint")
    try:
        found = Checkpoint(folder)
        if found.is_called(expected):
            return None
    except UserError as error:
        return str(error)
    return f"the weights are not those of run {run['run_id']} (fingerprint {found.fingerprint}, not {expected})"


def pareto_front(runs: Sequence[Run]) -> list[Run]:
    """The cells that no other beats in both accuracy and sparsity of the merged model, sparsest first."""
    names = ("eval/accuracy", "sparsity/after_merge")
    scored = [run for run in runs if set(names) <= set(run["metrics"])]
    points = np.array([[run["metrics"][name] for name in names] for run in scored]).reshape(-1, 2)
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

    Returns:
        the folders or addresses of the models kept.
    """
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in tracker.children(parent):
        own = not {"same_as", "superseded"} & run["tags"].keys()
        if run["tags"].get("kind") == "cell" and run["status"] == "FINISHED" and own:
            groups[run["params"].get("cfg/model", ""), run["params"].get("cfg/task", "")].append(run)
    fronts = {key: pareto_front(runs) if front_only else runs for key, runs in groups.items()}
    kept: list[Path] = []
    progress.start("models of the front", sum(map(len, fronts.values())), "models")
    for key, runs in groups.items():
        chosen = {run["run_id"] for run in fronts[key]}
        for run in runs:
            if run["run_id"] not in chosen:
                _remove_model(tracker, run, folder)
                continue
            try:
                kept.append(_keep(tracker, run, folder, register, bench, said))
            except (UserError, OSError) as error:
                said(f"{run['name']} is on the Pareto front, but its model could not be kept: {error}")
            progress.advance(note=run["name"])
    progress.stop()
    return kept


def _keep(
    tracker: Tracker, run: Run, folder: Path, register: bool, bench: Workbench, said: Callable[[str], None]
) -> Path:
    tags = run["tags"]
    if tags.get("registered_as"):
        return Path(tags["registered_as"])
    name = re.sub(r"[^\w.-]+", "-", run["name"])
    target = folder / "models" / f"{name}-{run['run_id'][:8]}"
    whole = folder / "cells" / tags["cell_key"] / "merged"
    if _not_of(run, target) is not None:  # absent, or left there by a start that was stopped or refused
        if _not_of(run, whole) is None:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(whole, target)
        else:
            rebuild(tracker, run["run_id"], target, bench)
    tracker.log(run["run_id"], tags={"model_folder": str(target.absolute())})
    if not register:
        return target
    cell = replace(_cell(tracker, run), register_as="auto")
    protocol = {k.removeprefix("protocol/"): v for k, v in run["params"].items() if k.startswith("protocol/")}
    result = CellResult(metrics=run["metrics"], protocol=protocol, tags=tags, merged=target)
    address = register_cell(tracker, run["run_id"], cell, result, said=said)
    shutil.rmtree(target)
    tracker.log(run["run_id"], tags={"model_folder": ""})
    return Path(address)


def _remove_model(tracker: Tracker, run: Run, folder: Path) -> None:
    """A model that left the front, or a whole checkpoint that waited to learn whether it is on it."""
    own = Path(run["tags"].get("model_folder") or folder / "cells" / run["tags"]["cell_key"] / "merged")
    if own.is_dir() and own.resolve().is_relative_to(folder.resolve()):
        shutil.rmtree(own)
        tracker.log(run["run_id"], tags={"model_folder": ""})


def _cell(tracker: Tracker, run: Run) -> CellConfig:
    values = yaml.safe_load(tracker.fetch_text(run["run_id"], "config.yaml"))
    # A run of before there was a choice rounded to the nearest.
    return make_cell({"rounding": "nearest", **values}, f"run {run['run_id']}")


def _masks(tracker: Tracker, run: Run, cell: CellConfig, scratch: Path) -> MaskFile | None:
    """The cell's masks by their checksum: from the study's folder, from the artifacts, or from the file named."""
    checksum = run["tags"].get("mask_checksum")
    if checksum is None:
        return None
    if cell.masks != "none" and Path(cell.masks).is_file():
        given = mask_file(cell.masks).file
        if given.checksum == checksum:
            return given
    parent = tracker.run(run["parent_run_id"]) if run["parent_run_id"] else None
    if parent is not None:
        for manifest in sorted((Path(parent["tags"].get("folder", "")) / "masks").glob("*/mask_set.json")):
            if any(entry["checksum"] == checksum for entry in json.loads(manifest.read_text(encoding="utf-8"))):
                for file in read_manifest(manifest.parent) or ():
                    if file.checksum == checksum:
                        return file
    if cell.importance == "sparsegpt":
        raise UserError(
            f"run {run['run_id']}: SparseGPT also changes the weights it keeps, and the study's folder, which holds "
            "them, is gone; make the masks again with compute_masks."
        )
    label = level_label(cell.sparsity)
    for holder in [run, *(tracker.children(parent["run_id"]) if parent else [])]:
        own = holder["run_id"] == run["run_id"]
        if not own and holder["tags"].get(f"mask_checksum_{label}") != checksum:
            continue
        for name in tracker.artifacts(holder["run_id"], "masks"):
            if Path(name).name.startswith(f"masks_sparsity{label}_"):
                found = mask_file(tracker.fetch(holder["run_id"], name, scratch)).file
                if found.checksum == checksum:
                    return found
    raise UserError(f"run {run['run_id']}: its masks ({checksum[:12]}) are neither in the study's folder nor logged.")
