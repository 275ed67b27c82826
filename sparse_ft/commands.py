"""The single steps as runs of their own: masks, one cell, validation, analysis."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sparse_ft.analysis.terminal import print_table, terminal_table
from sparse_ft.analysis.write import write_analysis
from sparse_ft.cell.failures import classify
from sparse_ft.cell.identity import cell_identity, cell_key
from sparse_ft.cell.masks import check_mask_set, check_shrink, make_masks, mask_file, shrink
from sparse_ft.cell.rebuild import rebuild as rebuild_checkpoint
from sparse_ft.cell.record import (
    log_cell_inputs,
    log_cell_result,
    log_failure,
    log_mask_files,
    log_mask_inputs,
    log_masks,
    mask_tags,
)
from sparse_ft.cell.register import register_cell
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.settings import check_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.levels import level_label, levels_text
from sparse_ft.masks.files import load_masks
from sparse_ft.models.loading import resolve_device
from sparse_ft.progress import shown_progress
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import AnalyzeConfig, MaskConfig, RebuildConfig, ValidateConfig
from sparse_ft.study.checks.preflight import check_examples, check_targets
from sparse_ft.study.report import in_milliseconds, study_console, ui_command, write_curve_runs
from sparse_ft.tracking.models import is_model_uri, resolve_model
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.runs import Tracker
from sparse_ft.validation import validate_checkpoint

__all__ = ["analyze", "compute_masks", "rebuild", "train", "validate"]


def compute_masks(config: MaskConfig) -> int:
    """Makes masks and logs them as a run. Returns 0.

    Raises:
        UserError: wrong input; nothing was logged then, where it could be known beforehand.
    """
    bench = Workbench(shown_progress())
    if config.shrink:
        check_shrink(config)
    check_mask_set(config, bench)  # an unknown model, or too little text to look at, makes no run
    tracker = Tracker()
    run_id = tracker.start(f"masks {Path(config.model).name} {config.method}", {"kind": "masks"})
    with _logged(tracker, run_id):
        log_mask_inputs(tracker, run_id, config)
        files = make_masks(config, bench)
        log_masks(tracker, run_id, files)
        smaller = shrink(config, files, bench) if config.shrink else []
    for file in files:
        print(f"{level_label(file.sparsity)} %: {file.pruned} of {file.weights} weights pruned, {file.path}")
    for path in smaller:
        print(f"smaller checkpoint: {path}")
    return 0


def train(config: CellConfig) -> int:
    """Runs one cell as a run and prints its table. Returns 0.

    Raises:
        UserError: wrong input; nothing was logged then, where it could be known beforehand.
        ValidationFailedError: the merged checkpoint breaks what the mode promises.
    """
    bench = Workbench(shown_progress())
    given = None
    if config.pruned and config.masks != "none":
        given = mask_file(config.masks)
        config = replace(config, **given.described)
    check_cell(config)
    resolve_device(config.device)  # one that is not here makes no run
    bench.checkpoint(config.model).prunable_shapes()
    check_targets(config, bench)
    check_examples(config, bench)
    kind = mask_set_of(config)
    if kind is not None:
        kind = replace(kind, sparsities=levels_text([config.sparsity]))
        check_mask_set(kind, bench)

    identity = cell_identity(config, bench)
    tracker, folder = Tracker(), Path(config.output_dir)
    run_id = tracker.start(config.title, {"kind": "cell"})
    with _logged(tracker, run_id):
        log_cell_inputs(tracker, run_id, config, identity)
        masks = given.file if given else None
        if kind is not None:
            (masks,) = make_masks(kind, bench, folder / "masks")
            log_mask_files(tracker, run_id, [masks])
            tracker.log(run_id, tags=mask_tags([masks]))
        tracker.log(run_id, tags={"cell_key": cell_key(config, identity, masks.checksum if masks else "")})
        result = run_cell(config, masks, bench, folder, warn_foreign=True)
        log_cell_result(tracker, run_id, result)
        address = None
        if config.register_as != "none":
            address = register_cell(tracker, run_id, config, result, bench.progress)
    if "warning" in result.tags:
        print(f"train: warning: {result.tags['warning']}", file=sys.stderr)
    console = study_console()
    print_table(console, terminal_table(in_milliseconds([tracker.run(run_id)])))
    if address:
        console.print(f"registered: {address}", highlight=False, soft_wrap=True)
    console.print(f"everything, in a browser: {ui_command(tracker)}", highlight=False, soft_wrap=True)
    return 0


def validate(config: ValidateConfig) -> int:
    """Checks a checkpoint against its masks. Returns 0 when it obeys them, else 1."""
    masks = load_masks(config.masks)
    tracker = Tracker()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(config.checkpoint)
        if is_model_uri(config.checkpoint):
            folder = resolve_model(config.checkpoint, tracker.uri, scratch)
        validation = validate_checkpoint(folder, masks, config.tolerance, shown_progress())
    report = validation.to_dict() | {"checkpoint": config.checkpoint}
    if config.report != "none":
        write_json(config.report, report)
    run_id = tracker.start(f"validate {Path(config.checkpoint).name}", {"kind": "validation"})
    with tracker.ending(run_id):
        tracker.log(
            run_id,
            params=flatten_config({"checkpoint": config.checkpoint, "masks": config.masks}),
            metrics={
                "sparsity/violations": validation.violations,
                "sparsity/after_merge": validation.sparsity,
                "sparsity/target": validation.sparsity_asked,
            },
            tags={"mask_checksum": masks.checksum, "valid": validation.ok},
        )
        tracker.log_dict(run_id, report, "validation.json")
    print("\n".join(validation.lines()))
    return 0 if validation.ok else 1


def analyze(config: AnalyzeConfig) -> int:
    """Writes tables, figures and curve runs for a study or an experiment, as a run of its own. Returns 0."""
    if config.parent_run_id == config.experiment == "none":
        raise UserError("Nothing to analyze: give parent_run_id (a study's run) or experiment (a name).")
    if config.parent_run_id != "none":
        tracker = Tracker.reading(run_id=config.parent_run_id)
        parent, found = config.parent_run_id, tracker.run(config.parent_run_id)
        if found["tags"].get("kind") != "study":
            raise UserError(f"The run {parent} ({found['name']}) is no study; give a study's run, or an experiment.")
        title, runs = found["name"], tracker.children(parent)
    else:
        tracker = Tracker.reading(config.experiment)
        parent, title = None, config.experiment
        runs = tracker.search(experiment_id=tracker.experiment(config.experiment))
    rows = in_milliseconds(runs)
    run_id = tracker.start(f"analysis {title}", {"kind": "analysis"})
    with tracker.ending(run_id):
        tracker.log(run_id, params=flatten_config(config))
        folder = Path(config.output_dir)
        result = write_analysis(
            rows, folder, baseline=_optional(config.baseline), title=title, progress=shown_progress()
        )
        tracker.log_folder(run_id, folder, "report")
        write_curve_runs(tracker, parent, result.curves)
    console = study_console()
    print_table(console, terminal_table(rows))
    for path in result.files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return 0


def rebuild(config: RebuildConfig) -> int:
    """Writes the merged checkpoint of a cell again, from its adapter and masks. Returns 0."""
    target = Path(config.output_dir)
    if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
        raise UserError(f"{target} holds something else than a checkpoint; choose another output_dir.")
    rebuild_checkpoint(Tracker(), config.run_id, target, Workbench(shown_progress()))
    print(f"rebuilt, bit for bit: {target}")
    return 0


def _optional(value: str) -> str | None:
    return None if value == "none" else value


@contextmanager
def _logged(tracker: Tracker, run_id: str) -> Iterator[None]:
    """Ends the run as its block ends; a failure's class, message and traceback stay with it."""
    with tracker.ending(run_id):
        try:
            yield
        except Exception as error:
            log_failure(tracker, run_id, classify(error))
            raise
