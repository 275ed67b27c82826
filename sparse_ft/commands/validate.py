"""``validate``: a checkpoint against its masks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sparse_ft.files import write_json
from sparse_ft.masks.files import load_masks
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.progress import shown_progress
from sparse_ft.settings.command_line import command_line
from sparse_ft.settings.commands import ValidateConfig
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.stores import is_model_uri
from sparse_ft.validation import validate_checkpoint

__all__ = ["validate"]


def validate(config: ValidateConfig) -> int:
    """Checks a checkpoint against its masks. Returns 0 when it obeys them, else 1."""
    masks = load_masks(config.masks)
    if not is_model_uri(config.checkpoint):
        open_checkpoint(config.checkpoint)
    # mlflow takes seconds to import: what is wrong with the files is reported before.
    from sparse_ft.tracking.runs import Tracker

    tracker = Tracker()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(config.checkpoint)
        if is_model_uri(config.checkpoint):
            from sparse_ft.tracking.models import resolve_model

            folder = resolve_model(config.checkpoint, tracker.uri, scratch)
        validation = validate_checkpoint(folder, masks, config.tolerance, shown_progress())
    report = validation.to_dict() | {"checkpoint": config.checkpoint}
    if config.report is not None:
        write_json(config.report, report)
    tags = {Tag.KIND: Kind.VALIDATION, Tag.COMMAND: command_line("validate", config)}
    run_id = tracker.start(f"validate {Path(config.checkpoint).name}", tags)
    with tracker.ending(run_id):
        tracker.log(
            run_id,
            params=flatten_config({"checkpoint": config.checkpoint, "masks": config.masks}),
            metrics={
                "sparsity/violations": validation.violations,
                "sparsity/after_merge": validation.sparsity,
                "sparsity/target": validation.sparsity_asked,
            },
            tags={Tag.MASK_CHECKSUM: masks.checksum, Tag.VALID: validation.ok},
        )
        tracker.log_dict(run_id, report, "validation.json")
    print("\n".join(validation.lines()))
    return 0 if validation.ok else 1
