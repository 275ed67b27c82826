"""Everything that would stop a study hours later, asked before its first cell, and all of it at once."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from sparse_ft.cell.masks import check_given, check_mask_set
from sparse_ft.cell.teacher import check_teacher, teacher_model
from sparse_ft.cell.trainer import LOCAL
from sparse_ft.cell.training import Trainer
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.devices import check_device, itemsize, resolve_device
from sparse_ft.models.names import role
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.field import defaults, plain_values
from sparse_ft.settings.lora import ALWAYS
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.training_data import TrainingDataSettings
from sparse_ft.study.checks.disk import disk_problems, gigabytes, model_bytes
from sparse_ft.study.checks.passed import Checks
from sparse_ft.study.plan import Plan

__all__ = ["check_examples", "check_plan", "check_resources"]


def check_plan(plan: Plan, bench: Workbench, trainer: Trainer = LOCAL, repeat: bool = True) -> list[str]:
    """What the study asks for and cannot be had: settings, masks, models, tasks, a training. One line each.

    Args:
        plan: what is to be run.
        bench: finds models and tasks.
        trainer: of the cells.
        repeat: read tokenizers, tasks and rows too where the same were read before and nothing was amiss.
    """
    checks = Checks(repeat)
    cells = plan.configs
    for cell in cells:
        checks.problems |= dict.fromkeys(cell.problems())
    for device in dict.fromkeys(cell.device for cell in cells):
        checks(check_device, device)
    for cell in cells:
        checks(lambda cell=cell: trainer.check(cell, bench.checkpoint(cell.model)))
    for model in dict.fromkeys(cell.model for cell in cells):
        checks(lambda model=model: bench.checkpoint(model).prunable_shapes())
    for cell in {(c.model, c.teacher, c.teacher_squarehead): c for c in cells if c.has_teacher}.values():
        checks(check_teacher, cell, bench)
    for item in plan.mask_sets:
        if item.config.needs_calibration:
            places = _places(item.config, bench, item.config.calibration_corpus)
            checks.once(("masks", plain_values(item.config)), places, check_mask_set, item.config, bench)
        else:
            checks(check_mask_set, item.config, bench)
    given = [cell for cell in cells if cell.pruned and cell.masks is not None]
    for cell in {(cell.model, cell.masks): cell for cell in given}.values():
        checks(check_given, cell, bench)
    for rows, cell in {_rows_of(cell): cell for cell in cells}.items():
        checks.once(("examples", *rows), _places(cell, bench, *cell.sources), check_examples, cell, bench)
    return [*checks.problems, *trainer.missing()]


def check_resources(
    plan: Plan, bench: Workbench, folder: Path, artifacts: str | None, workers: int, here: bool = True
) -> list[str]:
    """Whether disk and memory can hold a plan that `check_plan` has nothing against. One line a problem.
    For the arguments see `sparse_ft.study.checks.disk.disk_problems`; workers that are not ``here`` have memory of
    their own."""
    problems = disk_problems(plan, bench, folder, artifacts, workers)
    return problems + list(filter(None, [_memory_problem(plan, bench, workers) if here else None]))


def check_examples(cell: CellConfig, bench: Workbench) -> None:
    """Checks that training finds what it learns from: a split, answers among the choices, room for them; of rows
    of one's own every one that is trained on; and that what is scored beside it is there.

    Raises:
        UserError: it does not, or the model or the task cannot be had.
    """
    from sparse_ft.cell.training_set import training_set

    bench.tokenizer(cell.model)
    bench.task(cell)
    bench.suite(cell)
    if cell.chat_template:
        bench.chat_template(cell.model)
    if MODES[cell.mode].trains:
        training_set(cell, bench, limit=1 if cell.sources == (TASK,) else None)


def _rows_of(cell: CellConfig) -> tuple[Any, ...]:
    """What `check_examples` looks at; cells that agree in it are looked at once."""
    names = ["model", "task", "data_dir", "include_path", "num_fewshot", "max_seq_len", "score", "chat_template"]
    if cell.sources != (TASK,):
        names += [*defaults(TrainingDataSettings), "seed", "examples_needed"]
    return (MODES[cell.mode].trains, *(getattr(cell, name) for name in names))


def _memory_problem(plan: Plan, bench: Workbench, workers: int) -> str | None:
    """What a cell cannot do without are the weights, and the effective ones that it keeps always: only what certainly
    does not fit is refused."""
    needs = []
    for cell in plan.configs:
        copies = 4 if MODES[cell.mode].trains_weights else 1  # with gradients and two moments
        size = copies * model_bytes(cell, bench)
        if cell.has_teacher and not cell.lifts_masks:
            size += model_bytes(replace(cell, model=teacher_model(cell, bench)), bench)
        device = resolve_device(cell.device)
        each = cell.gpus_per_cell if device.type == "cuda" else 1  # processes on CPUs share the memory
        size = math.ceil(size / each) + _kept_bytes(cell, bench)
        needs.append((size, cell.model, device, each, cell.keep_effective))
    size, model, device, each, keeping = max(needs, key=lambda need: need[0])
    if device.type == "cuda":
        import torch

        sharing = math.ceil(workers * each / max(1, torch.cuda.device_count()))
        free, there = torch.cuda.mem_get_info(device)[1], "the GPU has"
    else:
        sharing, free, there = workers, psutil.virtual_memory().total, "this machine has"
    if sharing * size <= free:
        return None
    return (
        f"{sharing} worker(s) with {model} need at least {gigabytes(sharing * size)} of memory and {there} "
        f"{gigabytes(free)}; use fewer workers (max_workers), dtype bfloat16, more GPUs for a cell (gpus_per_cell),"
        f"{' keep_effective: auto,' if keeping == ALWAYS else ''} or a smaller model."
    )


def _kept_bytes(cell: CellConfig, bench: Workbench) -> int:
    """Of effective weights that are kept always. The first block's inputs may need no gradient: it is left out. Blocks
    under gradient checkpointing keep theirs one after another."""
    single = cell.method in ("unstructured", "semi_structured", "random") and cell.masks is None
    mode = MODES[cell.mode]
    if not (cell.keep_effective == ALWAYS and mode.lora and mode.keeps_zeros and single):
        return 0
    checkpoint, blocks = bench.checkpoint(cell.model), Counter()
    for name, shape in checkpoint.prunable_shapes().items():
        what = role(checkpoint.config, name)
        blocks[what.block] += math.prod(shape) if what.is_adapted(cell.target_modules) else 0
    counted = [count for block, count in blocks.items() if block]
    most = max(counted, default=0) if cell.gradient_checkpointing else sum(counted)
    return itemsize(cell.dtype, cell.device) * most


def _places(settings: CellConfig | MaskConfig, bench: Workbench, *texts: str) -> list[str | Path]:
    """The files and folders behind the names of a model, a task and texts."""
    with suppress(UserError):  # the model cannot be had, which its check says
        named = (settings.data_dir, settings.include_path, *texts)
        return [bench.checkpoint(settings.model).folder, *(name for name in named if name is not None)]
    return []
