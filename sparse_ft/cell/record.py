"""What the study writes into its runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from sparse_ft.cell.failures import Failure, classify
from sparse_ft.cell.result import CellResult
from sparse_ft.levels import level_steps, levels_text
from sparse_ft.masks.statistics import block_sparsities
from sparse_ft.models.devices import device_name, resolve_device
from sparse_ft.pruning.output import MaskFile, block_error, error_points
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.command_line import command_line
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.field import defaults, plain_values
from sparse_ft.settings.pruning import RecipeSettings
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Tag, level_tag, version_tag
from sparse_ft.tracking.stores import reachable

if TYPE_CHECKING:
    from sparse_ft.tracking.live import LivePoints
    from sparse_ft.tracking.runs import Tracker

__all__ = [
    "cell_command",
    "device_tags",
    "error_curves",
    "log_cell_inputs",
    "log_cell_result",
    "log_failure",
    "log_mask_files",
    "log_mask_inputs",
    "log_masks",
    "log_what_can_be",
    "mask_tags",
    "recorded",
]

_TAG_ROOM = 1000  # characters; all remarks are in the mask files' metadata


def log_cell_inputs(
    tracker: Tracker,
    run_id: str,
    cell: CellConfig,
    identity: Mapping[str, str],
    planned: CellConfig | None = None,
    tags: Mapping[str, str] | None = None,
    tuned: str = "",
    levels: Sequence[float] = (),
) -> None:
    """The cell's configuration, as parameters ``cfg/...`` and as ``config.yaml``, what its names stand for, as
    parameters ``identity/...`` (see `sparse_ft.cell.identity`), and the command that repeats it, with other ``tags``.

    A cell that runs with a smaller batch than ``planned`` is the planned one in the parameters, by which results are
    compared, and the one that ran in the file, from which it can be repeated.
    """
    names = flatten_config((planned or cell).canonical())
    tags = {**(tags or {}), Tag.COMMAND: cell_command(cell, identity, tuned, levels)}
    tracker.log(run_id, params=names | flatten_config(dict(identity), "identity"), tags=tags)
    tracker.log_dict(run_id, cell.canonical(), "config.yaml")


def cell_command(
    cell: CellConfig, identity: Mapping[str, str], tuned: str = "", levels: Sequence[float] = ()
) -> str | None:
    """The command that runs a cell by itself, with the run of its ``tuned`` teacher, and with those of the ``levels``
    of its mask set on which its masks depend; None: it cannot be said."""
    if "trainer" in identity and not hasattr(cell, "trainer"):
        return None  # one elsewhere has settings of its own, which the cell of a study does not know
    # What a mask file says of itself is read again.
    told = () if cell.masks is None else (*defaults(RecipeSettings), "sparsity")
    command = command_line("train", replace(cell, teacher=f"runs:/{tuned}") if tuned else cell, told)
    lower = [level for level in levels if 0 < level < cell.sparsity]
    if command is None or not lower or not cell.needs_calibration or cell.masks is not None:
        return command
    return f"{command} --mask_levels={levels_text(lower)}"


def device_tags(device: str) -> dict[str, str]:
    """What the device of that name is, for whoever computes on it: to ask takes hold of a GPU."""
    import torch

    tags = {Tag.DEVICE_NAME: device_name(resolve_device(device))}
    return tags | ({version_tag("cuda"): torch.version.cuda} if torch.version.cuda else {})


def log_cell_result(tracker: Tracker, run_id: str, result: CellResult, note: str | None = None) -> None:
    """All that a cell measured, with its note, in one batch, then its files and tables."""
    tracker.log(
        run_id,
        params=flatten_config(result.protocol, "protocol"),
        metrics=result.metrics,
        tags={**result.tags, Tag.NOTE: note},
        curves=result.series,
    )
    for path, folder in result.artifacts:
        if path.is_dir():
            tracker.log_folder(run_id, path, folder)
        else:
            tracker.log_file(run_id, path, folder)
    if result.tables:
        import pandas as pd

        from sparse_ft.tracking.tables import log_table

        for name, rows in result.tables.items():
            log_table(tracker, run_id, pd.DataFrame(rows), name)


def log_failure(tracker: Tracker, run_id: str, failure: Failure) -> None:
    """Class and message as tags, the traceback as an artifact."""
    note = f"**It failed** ({failure.kind}): {failure.message}\n\nThe traceback is `traceback.txt`."
    tags = {Tag.FAILURE_CLASS: failure.kind, Tag.FAILURE_MESSAGE: failure.message, Tag.NOTE: note}
    tracker.log(run_id, tags=tags)
    tracker.log_text(run_id, failure.traceback, "traceback.txt")


def log_what_can_be(tracker: Tracker, run_id: str, failure: Failure) -> None:
    """Logs a failure where that is possible: a full disk or a store that is away must neither hide it nor take mlflow's
    minutes of trying."""
    with suppress(Exception):
        reachable(tracker.uri)
        log_failure(tracker, run_id, failure)


@contextmanager
def recorded(tracker: Tracker, run_id: str) -> Iterator[None]:
    """Ends the run as its block ends; a failure's class, message and traceback stay with it."""
    with tracker.ending(run_id):
        try:
            yield
        except Exception as error:
            log_what_can_be(tracker, run_id, classify(error))
            raise


def log_mask_inputs(tracker: Tracker, run_id: str, config: MaskConfig, tags: Mapping[str, str] | None = None) -> None:
    """The mask configuration, as parameters ``cfg/...`` and as ``config.yaml``, and the command that repeats it, with
    other ``tags``."""
    values = {key: value for key, value in plain_values(config).items() if key != "output_dir"}
    tracker.log(
        run_id, params=flatten_config(values), tags={**(tags or {}), Tag.COMMAND: command_line("compute_masks", config)}
    )
    tracker.log_dict(run_id, values, "config.yaml")


def log_masks(tracker: Tracker, run_id: str, files: Sequence[MaskFile], points: LivePoints) -> None:
    """Masks, statistics and pictures as artifacts; sparsity as metrics, whose steps are the levels; and what ``points``
    have not taken of the blocks' errors, whose steps are the blocks."""
    step, steps = level_steps(file.sparsity for file in files)
    curves = {
        "sparsity/target": [(step(file.sparsity), file.sparsity) for file in files],
        "sparsity/achieved": [(step(file.sparsity), file.achieved) for file in files],
        **error_curves(files),
    }
    tracker.log(run_id, curves=points.rest(curves), tags={**mask_tags(files), Tag.STEPS: steps})
    log_mask_files(tracker, run_id, files)


def error_curves(files: Sequence[MaskFile]) -> dict[str, list[tuple[int, float]]]:
    """What was measured of each block when these masks were made, metric -> [(block, value)]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for file in files:
        if errors := file.metadata.get("block_errors"):
            measured = [(number, error) for number, error in enumerate(errors, 1) if error is not None]
            curves[block_error(file.sparsity)] = measured
        for number, around in enumerate(file.metadata.get("reconstruction", {"blocks": []})["blocks"], 1):
            for name, value in error_points(file.sparsity, around["before"], around["after"]).items():
                curves.setdefault(name, []).append((number, value))
    return curves


def log_mask_files(tracker: Tracker, run_id: str, files: Sequence[MaskFile]) -> None:
    """The files of these masks as artifacts, and no others that lie in their folder from before."""
    paths = [path for file in files for path in (file.path, file.statistics, file.histogram, file.heatmap)]
    for path in [*paths, files[0].summary, files[0].path.parent / "coverage.json"]:
        if path is not None and path.is_file():
            tracker.log_file(run_id, path, "masks")


def mask_tags(files: Sequence[MaskFile]) -> dict[str, str]:
    """What a run says of its masks, level by level, so that nobody needs to read the files for it.

    ``mask_checksum_70`` and ``block_sparsity_70`` (a JSON list, block by block); after a reconstruction
    ``reconstruction_error_70``, each block's error before and after. What the pruning had to say (more
    damping in a Cholesky factorisation, experts without text) is the tag ``warning``.
    """
    tags = {}
    for file in files:
        tags[level_tag(Tag.MASK_CHECKSUM, file.sparsity)] = file.checksum
        blocks = block_sparsities(json.loads(file.statistics.read_text(encoding="utf-8")))
        tags[level_tag(Tag.BLOCK_SPARSITY, file.sparsity)] = json.dumps([round(block, 5) for block in blocks])
        if tuned := file.metadata.get("reconstruction"):
            errors = [[float(f"{block[when]:.4g}") for when in ("before", "after")] for block in tuned["blocks"]]
            tags[level_tag(Tag.RECONSTRUCTION_ERROR, file.sparsity)] = json.dumps(errors)
    remarks = files[0].metadata.get("notes", [])
    if remarks:
        tags[Tag.WARNING] = "; ".join(remarks)[:_TAG_ROOM]
    return tags
