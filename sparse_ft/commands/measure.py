"""``measure``: bytes and tokens per second of every form of a sparse model."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from sparse_ft.files import write_json
from sparse_ft.masks.files import load_masks
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import check_device
from sparse_ft.progress import shown_progress
from sparse_ft.settings.commands import MeasureConfig
from sparse_ft.tracking.record import Kind, Tag

__all__ = ["measure"]


def measure(config: MeasureConfig) -> int:
    """Measures, logs a run with the metrics ``measure/FORM/...`` and prints a table. Returns 0.

    Raises:
        UserError: wrong input; nothing was logged then.
    """
    config.check()
    masks = load_masks(config.masks)
    Checkpoint(config.checkpoint)
    check_device(config.device)
    # What loads models and logs takes seconds to import: what is wrong with the files is reported before.
    from sparse_ft.cell.measure import lines, measure_forms
    from sparse_ft.cell.record import recorded
    from sparse_ft.settings.field import plain_values
    from sparse_ft.tracking.parameters import flatten_config
    from sparse_ft.tracking.runs import Tracker

    with tempfile.TemporaryDirectory() as scratch:
        found = measure_forms(config.checkpoint, masks, config, Path(scratch), shown_progress())
    report = {"checkpoint": config.checkpoint, "mask_checksum": masks.checksum, "sparsity": masks.sparsity}
    report |= {"protocol": found.protocol, "forms": [asdict(form) for form in found.forms], "absent": found.absent}
    if config.report is not None:
        write_json(config.report, report)
    tracker = Tracker()
    run_id = tracker.start(f"measure {Path(config.checkpoint).name}", {Tag.KIND: Kind.MEASUREMENT})
    with recorded(tracker, run_id):
        params = flatten_config(plain_values(config)) | flatten_config(found.protocol, "protocol")
        metrics = found.metrics() | {"sparsity/achieved": masks.sparsity}
        tracker.log(run_id, params=params, metrics=metrics, tags={Tag.MASK_CHECKSUM: masks.checksum})
        tracker.log_dict(run_id, report, "measure.json")
    print("\n".join(lines(found)))
    return 0
