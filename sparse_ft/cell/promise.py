"""What a mode promises of its zeros, held against the merged checkpoint."""

from __future__ import annotations

from pathlib import Path

from sparse_ft.cell.failures import ValidationFailedError
from sparse_ft.cell.result import CellResult
from sparse_ft.files import write_json
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import Progress
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.validation import validate_checkpoint

__all__ = ["check_promise"]


def check_promise(
    cell: CellConfig,
    merged: Path,
    start: Checkpoint,
    masks: MaskSet | None,
    base_violations: int,
    result: CellResult,
    report: Path,
    progress: Progress,
) -> None:
    """Counts the weights that break the mode's promise, and logs the validation.

    They are masked weights that are not zero in the merged checkpoint, or, of sparse_to_dense, in the base under the
    adapter (its merged model is dense by design).

    Args:
        cell: what was run.
        merged: the merged checkpoint.
        start: the checkpoint that training began with.
        masks: None: all weights were kept.
        base_violations: masked weights of the trained base, under its adapter, that are not zero.
        result: gets the metrics and the report.
        report: the JSON file to write.
        progress: told how far it is.

    Raises:
        ValidationFailedError: the promise is broken, or a tensor changed that was not trained.
    """
    mode = MODES[cell.mode]
    validation = validate_checkpoint(
        merged,
        MaskSet.all_kept(start.prunable_shapes()) if masks is None else masks,
        base=start.folder if mode.lora else None,
        target_modules=cell.target_modules,
        progress=progress,
    )
    violations = base_violations if mode.loses_zeros else validation.violations
    result.metrics["sparsity/violations"] = violations
    result.metrics["sparsity/after_merge"] = validation.sparsity
    if not mode.masked_base:
        result.metrics.update({"sparsity/target": 0.0, "sparsity/achieved": 0.0})
    result.artifacts.append((write_json(report, validation.to_dict()), "validation"))
    problems = [] if mode.loses_zeros else list(validation.problems)
    if violations or problems:
        what = f"{violations} masked weights are not zero" if violations else problems[0]
        raise ValidationFailedError(f"{what}; see validation.json")
