"""The merged checkpoint of a cell again, from the adapter and the masks that its run holds."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from peft import PeftModel

from sparse_ft.cell.masks import mask_file, read_manifest
from sparse_ft.cell.start import starting
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder
from sparse_ft.levels import LevelPaths
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import load_sparse_lora
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.folder import is_packed
from sparse_ft.models.loading import apply_masks, load_state_into, save_model, saved_tokenizer
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.models.packed import PackedCheckpoint
from sparse_ft.models.packing import unpack_checkpoint
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.parser import Parser
from sparse_ft.tracking.record import Kind, Run, Tag, level_tag
from sparse_ft.tracking.runs import Tracker

__all__ = ["finished_cell", "logged_cell", "masks_of", "not_of", "rebuild"]


def rebuild(tracker: Tracker, run_id: str, target: Path, bench: Workbench) -> Path:
    """Makes a cell's merged checkpoint again, bit for bit, from its adapter (where it was trained) and its masks, or
    from the packed one that was kept.

    The result is compared with the fingerprint that the run holds: on another kind of device the last bit of a
    matrix product may differ, and then that is reported.

    Args:
        tracker: where the run is.
        run_id: of a FINISHED cell; one that is the ``same_as`` of another gives that one's model.
        target: the new checkpoint's folder.
        bench: finds and loads the base model.

    Raises:
        UserError: no such run, no adapter or masks any more, or weights that came out otherwise.
    """
    if (packed := _kept_packed(tracker, run_id)) is not None:
        return unpack_checkpoint(packed, target, bench.progress)
    run, cell = finished_cell(tracker, run_id)
    trains = MODES[cell.mode].trains
    with tempfile.TemporaryDirectory() as scratch:
        cell = replace(cell, output_dir=scratch)
        adapter = tracker.fetch(run.run_id, "adapter", scratch) if trains else None
        masks = masks_of(tracker, run, cell, Path(scratch))
        base, found = run.tags.get(Tag.BASE_FINGERPRINT), bench.checkpoint(cell.model)
        if not found.is_called(base):
            raise UserError(
                f"{cell.model} has other weights now ({found.fingerprint}) than run {run.run_id} used ({base})."
            )
        with (
            starting(masks, found, Path(scratch)) as begun,
            bench.borrow(cell, begun.checkpoint if begun.smaller else None) as model,
        ):
            recovered = _recovered(tracker, run)
            if recovered is not None:
                load_state_into(model, recovered)
            elif begun.checkpoint is not found and not begun.smaller:
                load_state_into(model, begun.checkpoint, begun.checkpoint.prunable)
            adapted = model
            if adapter is None:
                apply_masks(model, begun.masks)
            elif begun.masks is None:
                adapted = PeftModel.from_pretrained(model, str(adapter))
            else:
                adapted = load_sparse_lora(model, adapter, begun.masks)
            with atomic_folder(target) as made:
                merged = merge_all_lora_weights(adapted, cell.rounding, cell.seed, bench.progress) if trains else model
                save_model(merged, saved_tokenizer(bench.checkpoint(cell.model).folder), made, progress=bench.progress)
                if (problem := not_of(run, made)) is not None:
                    raise UserError(f"{problem}; rebuild on the kind of device that the cell ran on. Nothing is kept.")
    return target


def finished_cell(tracker: Tracker, run_id: str) -> tuple[Run, CellConfig]:
    """The run that holds what a cell's model can be made of again, and the cell.

    Args:
        tracker: where the run is.
        run_id: of the cell; one that is the ``same_as`` of another gives that one.

    Raises:
        UserError: no such run, not a finished cell, or without its adapter.
    """
    run = tracker.run(run_id)
    if run.same_as:
        run = tracker.run(run.same_as)
    if run.kind != Kind.CELL or not run.is_finished:
        raise UserError(f"run {run_id} is no finished cell ({run.status}); there is nothing to rebuild.")
    cell = logged_cell(tracker, run)
    if MODES[cell.mode].trains and not any(name.startswith("adapter/") for name in tracker.artifacts(run.run_id)):
        raise UserError(f"run {run_id} holds no adapter (mode {cell.mode}, keep: none); run the cell again.")
    return run, cell


def _kept_packed(tracker: Tracker, run_id: str) -> PackedCheckpoint | None:
    """The packed model that a study kept of a cell, where it is still there and still the run's."""
    run = tracker.run(run_id)
    run = tracker.run(run.same_as) if run.same_as else run
    folder = run.tags.get(Tag.MODEL_FOLDER)
    if not folder or not is_packed(folder) or not_of(run, Path(folder)) is not None:
        return None
    return PackedCheckpoint(folder)


def _recovered(tracker: Tracker, run: Run) -> Checkpoint | None:
    """The recovered model under the run's adapter, from the study's folder; None where there was no recovery."""
    wanted = run.tags.get(Tag.RECOVERED_FINGERPRINT)
    if wanted is None:
        return None
    parent = tracker.run(run.parent_run_id) if run.parent_run_id else run
    for config in sorted((Path(parent.folder) / "recovered").glob("*/config.json")):
        found = Checkpoint(config.parent)
        if found.is_called(wanted):
            return found
    raise UserError(
        f"run {run.run_id}: the recovered model ({wanted}) that its adapter belongs to is not in the study's folder any"
        " more; run the cell again."
    )


def not_of(run: Run, folder: Path) -> str | None:
    """Why a checkpoint is not the merged model of a run; None where it is."""
    expected = run.tags.get(Tag.MERGED_FINGERPRINT)
    try:
        found = open_checkpoint(folder)
        if found.is_called(expected):
            return None
    except UserError as error:
        return str(error)
    return f"the weights are not those of run {run.run_id} (fingerprint {found.fingerprint}, not {expected})"


def logged_cell(tracker: Tracker, run: Run) -> CellConfig:
    """The cell of a run, from its own ``config.yaml``."""
    values = yaml.safe_load(tracker.fetch_text(run.run_id, "config.yaml"))
    # A run of before there was a choice rounded to the nearest.
    return Parser(CellConfig).values({"rounding": "nearest", **values}, f"run {run.run_id}")


def masks_of(tracker: Tracker, run: Run, cell: CellConfig, scratch: Path, weights: bool = True) -> MaskFile | None:
    """The cell's masks by their checksum: from the study's folder, from the artifacts, or from the file named.

    Args:
        tracker: where the run is.
        run: of the cell.
        cell: its configuration.
        scratch: for what is fetched.
        weights: with those that belong to them, where pruning has changed the weights that stay.

    Raises:
        UserError: they are gone.
    """
    checksum = run.tags.get(Tag.MASK_CHECKSUM)
    if checksum is None:
        return None
    if cell.masks is not None and Path(cell.masks).is_file():
        given = mask_file(cell.masks).file
        if given.checksum == checksum:
            return given
    parent = tracker.run(run.parent_run_id) if run.parent_run_id else None
    if parent is not None:
        for manifest in sorted((Path(parent.folder) / "masks").glob("*/mask_set.json")):
            if any(entry["checksum"] == checksum for entry in json.loads(manifest.read_text(encoding="utf-8"))):
                for file in read_manifest(manifest.parent) or ():
                    if file.checksum == checksum:
                        return file
    if weights and cell.updating.changes_weights:
        raise UserError(
            f"run {run.run_id}: {cell.updating.title} also changes the weights that stay, and the study's folder, "
            "which holds them, is gone; make the masks again with compute_masks."
        )
    tag = level_tag(Tag.MASK_CHECKSUM, cell.sparsity)
    for holder in [run, *(tracker.children(parent.run_id) if parent else [])]:
        own = holder.run_id == run.run_id
        if not own and holder.tags.get(tag) != checksum:
            continue
        for name in tracker.artifacts(holder.run_id, "masks"):
            if Path(name).name.startswith(LevelPaths.prefix(cell.sparsity)):
                found = mask_file(tracker.fetch(holder.run_id, name, scratch)).file
                if found.checksum == checksum:
                    return found
    raise UserError(f"run {run.run_id}: its masks ({checksum[:12]}) are neither in the study's folder nor logged.")
