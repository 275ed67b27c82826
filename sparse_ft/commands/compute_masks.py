"""``compute_masks``: masks of every level, and a run that holds them."""

from __future__ import annotations

from pathlib import Path

from sparse_ft.cell.inputs import mask_inputs
from sparse_ft.cell.live import live
from sparse_ft.cell.masks import check_mask_set, check_shrink, make_masks, shrink
from sparse_ft.cell.record import device_tags, log_mask_inputs, log_masks, recorded
from sparse_ft.cell.workbench import Workbench
from sparse_ft.levels import level_label
from sparse_ft.progress import shown_progress
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.tracking.record import Kind, Tag

__all__ = ["compute_masks"]


def compute_masks(config: MaskConfig) -> int:
    """Makes masks and logs them as a run. Returns 0.

    Raises:
        UserError: wrong input; nothing was logged then, where it could be known beforehand.
    """
    bench = Workbench(shown_progress())
    if config.shrink:
        check_shrink(config)
    check_mask_set(config, bench)  # an unknown model, or too little text to look at, makes no run
    from sparse_ft.tracking.runs import Tracker  # mlflow takes seconds to import: wrong input is answered before

    tracker = Tracker()
    run_id = tracker.start(f"masks {Path(config.model).name} {config.method}", {Tag.KIND: Kind.MASKS})
    with recorded(tracker, run_id):
        here = device_tags(config.device) if config.needs_calibration else {}
        log_mask_inputs(tracker, run_id, config, here)
        tracker.log_inputs(run_id, mask_inputs(config, bench))
        with live(tracker, run_id, bench, Path(config.output_dir)) as points:
            files = make_masks(config, bench)
        log_masks(tracker, run_id, files, points)
        smaller = shrink(config, files, bench) if config.shrink else []
    for file in files:
        print(f"{level_label(file.sparsity)} %: {file.pruned} of {file.weights} weights pruned, {file.path}")
    for path in smaller:
        print(f"smaller checkpoint: {path}")
    return 0
