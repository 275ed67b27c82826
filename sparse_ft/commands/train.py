"""``train``: one cell as a run of its own."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from sparse_ft.cell.masks import GivenMasks, check_mask_set, make_masks, mask_file
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.progress import shown_progress, wide_console
from sparse_ft.settings.cell import TrainConfig, mask_set_of
from sparse_ft.tracking.record import Kind, Tag

__all__ = ["train"]


def train(config: TrainConfig) -> int:
    """Runs one cell as a run and prints its table. Returns 0.

    Raises:
        UserError: wrong input; nothing was logged then, where it could be known beforehand.
        TrainerError: the training on a Cerebras failed.
        ValidationFailedError: the merged checkpoint breaks what the mode promises.
    """
    bench = Workbench(shown_progress())
    given = None
    if config.pruned and config.masks is not None:
        given = mask_file(config.masks)
        config = given.settle(config)
    config.check()
    bench.checkpoint(config.model).prunable_shapes()
    return _run(config, given, bench)


def _run(config: TrainConfig, given: GivenMasks | None, bench: Workbench) -> int:
    # What trains, scores and logs takes seconds to import: a wrong model or wrong masks are reported before.
    from sparse_ft.analysis.terminal import print_tables
    from sparse_ft.cell.identity import cell_identity, cell_key
    from sparse_ft.cell.inputs import cell_inputs
    from sparse_ft.cell.live import live
    from sparse_ft.cell.note import cell_note
    from sparse_ft.cell.perplexity import usual_perplexity
    from sparse_ft.cell.record import (
        cell_command,
        device_tags,
        error_curves,
        log_cell_inputs,
        log_cell_result,
        log_mask_files,
        mask_tags,
        recorded,
    )
    from sparse_ft.cell.register import register_cell
    from sparse_ft.cell.run import run_cell
    from sparse_ft.cell.teacher import check_teacher
    from sparse_ft.cell.training import Watch
    from sparse_ft.models.devices import check_device, missing_gpus
    from sparse_ft.study.checks.preflight import check_examples
    from sparse_ft.study.trainers import make_trainer
    from sparse_ft.tracking.runs import Tracker
    from sparse_ft.tracking.stores import ui_command

    trainer, checkpoint = make_trainer(config.trainer, config.cerebras), bench.checkpoint(config.model)
    check_device(config.device)  # one that is not here makes no run
    if problem := missing_gpus(config.device, config.gpus_per_cell):
        raise UserError(problem)
    if config.leaves_perplexity_open:
        config = replace(config, **usual_perplexity([config]))
    config = config.settled()
    trainer.check(config, checkpoint)
    if missing := trainer.missing():
        raise UserError(" | ".join(missing))
    check_teacher(config, bench)
    check_examples(config, bench)
    kind = mask_set_of(config)
    if kind is not None:
        kind = replace(kind, sparsities=(*config.mask_levels, config.sparsity))
        check_mask_set(kind, bench)

    identity = cell_identity(config, bench, trainer.name)
    tracker, folder = Tracker(), Path(config.output_dir)
    run_id = tracker.start(config.title, {Tag.KIND: Kind.CELL})
    with recorded(tracker, run_id), tracker.system_metrics(run_id, after=10):
        log_cell_inputs(tracker, run_id, config, identity, tags=device_tags(config.device))
        tracker.log_inputs(run_id, cell_inputs(config, identity, bench))
        masks = given.file if given else None
        with live(tracker, run_id, bench, folder) as points:
            if kind is not None:
                *_, masks = make_masks(kind, bench, folder / "masks")  # ascending: the cell's own level is the last
                log_mask_files(tracker, run_id, [masks])
                tracker.log(run_id, tags=mask_tags([masks]), curves=points.rest(error_curves([masks])))
            tracker.log(run_id, tags={Tag.CELL_KEY: cell_key(config, identity, masks.checksum if masks else "")})
            try:
                result = run_cell(config, masks, bench, folder, trainer, Watch(run_id), warn_foreign=True)
            finally:
                bench.end()
        result.series = points.rest(result.series)
        log_cell_result(tracker, run_id, result, cell_note(config, result, cell_command(config, identity)))
        address = None
        if config.register_as is not None:
            address = register_cell(tracker, run_id, config, result, bench.progress, move=config.keep == "adapter")
            if config.keep != "all":
                shutil.rmtree(result.merged)
    if Tag.WARNING in result.tags:
        print(f"train: warning: {result.tags[Tag.WARNING]}", file=sys.stderr)
    console = wide_console()
    print_tables(console, [tracker.run(run_id)])
    if address:
        console.print(f"registered: {address}", highlight=False, soft_wrap=True)
    console.print(f"everything, in a browser: {ui_command(tracker.uri)}", highlight=False, soft_wrap=True)
    return 0
