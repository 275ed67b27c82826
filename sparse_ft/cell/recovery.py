"""Recovery: a pruned model trained on text under its mask, made once for all cells that begin with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from sparse_ft.cell.clock import Clock
from sparse_ft.cell.identity import cell_identity, digest, recovery_parts
from sparse_ft.cell.live import named
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.start import Start
from sparse_ft.cell.teaching import teaching
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import apply_sparse_lora
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_state_into, save_model, saved_tokenizer
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.modes import DENSE, FULL, MODES, SPARSE_TO_SPARSE
from sparse_ft.tasks.corpora import drawn_windows
from sparse_ft.tasks.examples import Example, calibration_texts, token_stream
from sparse_ft.tracking.record import Tag
from sparse_ft.training.trainer import train

__all__ = ["recover", "recovery_examples"]

_RECORD = "recovery.json"


def recover(
    cell: CellConfig,
    bench: Workbench,
    model: PreTrainedModel,
    start: Start,
    folder: Path,
    clock: Clock,
    result: CellResult,
    name: str,
    teacher: Checkpoint | None = None,
) -> Checkpoint:
    """Gives the model the weights that recovery ends with; trains them where no cell has done so before.

    In mode ``full`` all weights are trained under the mask, in the others an adapter under it, which is merged exactly.

    Args:
        cell: what is recovered, and how.
        bench: finds the text; its folder holds what was recovered.
        model: with the weights of ``start`` under its masks; changed in place.
        start: the weights and masks that recovery begins with.
        folder: for what was recovered, where nothing is shared.
        clock: is told what it took.
        result: is told how it went.
        name: of the cell's run, for those that take over what it trained.
        teacher: the weights that it learns from; None: from the text alone.

    Returns:
        the recovered checkpoint, complete.

    Raises:
        UserError: text that cannot be had.
        NonFiniteLossError: training diverged.
    """
    parts = {**recovery_parts(cell, cell_identity(cell, bench)), "weights": start.checkpoint.fingerprint}
    if teacher is not None and cell.teacher != DENSE.name:
        parts["teacher"] = teacher.fingerprint  # whatever it was called
    key = digest([parts, start.masks.checksum])
    place = (bench.recovered or folder / "recovered") / key
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # whoever comes second waits, which takes no longer than to train again
        said = _made(place)
        if said is not None:
            with clock("load"):
                load_state_into(model, Checkpoint(place))
        else:
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed, or changed since
            with clock("recover"):
                series = _train(cell, bench, model, start, teacher, place)
            said = {"recovered_by": name, "fingerprint": Checkpoint(place).fingerprint, "series": series}
            write_json(place / _RECORD, said)
    found = Checkpoint(place)
    result.tags |= {Tag.RECOVERED_BY: said["recovered_by"], Tag.RECOVERED_FINGERPRINT: found.fingerprint}
    result.series.update({metric: [tuple(point) for point in points] for metric, points in said["series"].items()})
    return found


def recovery_examples(cell: CellConfig, bench: Workbench) -> list[Example]:
    """As many windows of text as recovery consumes, with the loss on every token but the first.

    Those of the task's texts are cut without overlap and come again where the text ends; of a corpus they are drawn as
    calibration draws them.

    Raises:
        UserError: text that cannot be had, or that does not fill a window.
    """
    count, length = cell.recover_steps * cell.recover_batch_size, cell.recover_seq_len
    tokenizer = bench.tokenizer(cell.model)
    if cell.recover_corpus != TASK:
        rows = bench.corpus(cell.recover_corpus, cell.data_dir)
        windows = drawn_windows(rows, tokenizer, count, length, cell.seed).tolist()
        return [Example(window, 1) for window in windows]
    tokens = token_stream(calibration_texts(bench.task(cell), cell.seed), tokenizer, count * length)
    there = len(tokens) // length
    if not there:
        raise UserError(f"the training text of {cell.task} has {len(tokens)} tokens; lower recover_seq_len ({length}).")
    starts = [number % there * length for number in range(count)]
    return [Example(tokens[begin : begin + length], 1) for begin in starts]


def _made(place: Path) -> dict[str, Any] | None:
    """What is recorded of a recovered model; None where there is none, or its weights are others than were written."""
    try:
        said = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        return said if Checkpoint(place).is_called(said["fingerprint"]) else None
    except (OSError, ValueError, KeyError, UserError):
        return None


def _train(
    cell: CellConfig, bench: Workbench, model: PreTrainedModel, start: Start, teacher: Checkpoint | None, place: Path
) -> Mapping[str, list[Any]]:
    base = bench.checkpoint(cell.model)
    mode = FULL if MODES[cell.mode].trains_weights else SPARSE_TO_SPARSE
    settings = replace(
        cell,
        max_steps=cell.recover_steps,
        batch_size=cell.recover_batch_size,
        gradient_accumulation=1,
        num_epochs=None,
        schedule="linear",
        learning_rate=cell.recover_learning_rate,
    )
    torch.manual_seed(cell.seed)
    adapted = apply_sparse_lora(model, cell, mode.name, start.masks, cell.seed)
    examples, pad = recovery_examples(cell, bench), bench.tokenizer(cell.model).pad_token_id
    scratch = place.with_suffix(".trainer")
    with teaching(cell, teacher, start.checkpoint, adapted, start.masks) as guide:
        trained = train(
            adapted, examples, settings, scratch, pad, bench.progress, distillation=guide,
            report=lambda step, values: bench.progress.measured(step, named("recover", values)),
        )  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)
    merged = merge_all_lora_weights(adapted, cell.rounding, cell.seed, bench.progress)
    save_model(merged, saved_tokenizer(base.folder), place, progress=bench.progress)
    return named("recover", {"loss": trained.loss_curve, **trained.parts})
