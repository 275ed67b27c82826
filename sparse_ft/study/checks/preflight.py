"""Everything that would stop a study hours later, asked before its first cell, and all of it at once."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil

from sparse_ft.cell.masks import check_given, check_mask_set
from sparse_ft.cell.trainer import LOCAL, Trainer
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.masks.files import HEADER_ROOM
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import check_device, resolve_device, resolve_dtype
from sparse_ft.models.names import role
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.study.plan import Plan

__all__ = ["Disk", "check_examples", "check_plan", "check_resources", "estimate_disk", "gigabytes"]

_RUN_BYTES = 60_000  # configuration, validation report and database rows of a run


@dataclass(frozen=True)
class Disk:
    """Bytes that a study writes: ``artifacts`` into the tracking store, ``output`` into its own folder (among
    them ``passing`` ones, gone when it ends)."""

    masks: int
    adapters: int
    models: int
    passing: int
    registered: int
    runs: int

    @property
    def output(self) -> int:
        return self.masks + self.models + self.passing

    @property
    def artifacts(self) -> int:
        return self.masks + self.adapters + self.registered + self.runs

    def lines(self) -> Iterator[str]:
        """For the plan."""
        yield f"disk: at most {gigabytes(self.output)} in the output folder, {gigabytes(self.artifacts)} of artifacts"
        yield (
            f"  masks {gigabytes(self.masks)} in each, adapters {gigabytes(self.adapters)}, whole models "
            f"{gigabytes(self.models + self.registered)}, and {gigabytes(self.passing)} while cells run"
        )


def check_plan(plan: Plan, bench: Workbench, trainer: Trainer = LOCAL) -> list[str]:
    """What the study asks for and cannot be had: settings, masks, models, tasks, a training. One line each."""
    problems: dict[str, None] = {}
    for cell in plan.cells:
        problems |= dict.fromkeys(cell.problems())
    for device in dict.fromkeys(cell.device for cell in plan.cells):
        _note(problems, check_device, device)
    for cell in plan.cells:
        _note(problems, lambda cell=cell: trainer.check(cell, bench.checkpoint(cell.model)))
    for model in dict.fromkeys(cell.model for cell in plan.cells):
        _note(problems, lambda model=model: (bench.checkpoint(model).prunable_shapes(), bench.tokenizer(model)))
    for item in plan.mask_sets:
        _note(problems, check_mask_set, item.config, bench)
    for cell in {
        (cell.model, cell.masks): cell for cell in plan.cells if cell.pruned and cell.masks is not None
    }.values():
        _note(problems, check_given, cell, bench)
    for cell in {(c.task, c.data_dir, c.num_fewshot, c.include_path): c for c in plan.cells}.values():
        _note(problems, bench.task, cell)
    names = ("model", "task", "data_dir", "include_path", "num_fewshot", "max_seq_len")
    for cell in {tuple(getattr(cell, name) for name in names): cell for cell in plan.cells}.values():
        _note(problems, check_examples, cell, bench)
    return [*problems, *trainer.missing()]


def estimate_disk(plan: Plan, bench: Workbench, workers: int) -> Disk:
    """The most that the plan can write under its keep policy, computed from the models' shapes.

    Of the Pareto front it is not known beforehand how many models it has: one per sparsity is the most.
    """
    masks = adapters = models = 0
    biggest = 0
    fronts: dict[tuple[str, str], set[float]] = {}
    for item in plan.mask_sets:
        shapes = bench.checkpoint(item.config.model).prunable_shapes().values()
        packed = sum(math.prod(shape[:-1]) * math.ceil(shape[-1] / 8) for shape in shapes)
        masks += (packed + HEADER_ROOM) * len(item.config.levels)
    for cell, same in zip(plan.cells, plan.same_as, strict=True):
        if same is not None:
            continue
        checkpoint = bench.checkpoint(cell.model)
        size = _bytes(checkpoint, resolve_dtype(cell.dtype, resolve_device(cell.device)).itemsize)
        biggest = max(biggest, size)
        if cell.keep != "none" and MODES[cell.mode].lora:
            adapters += _adapter_bytes(checkpoint, cell.lora_r, cell.target_modules)
        if cell.keep == "all":
            models += size
        elif plan.study.kept == "pareto":
            levels = fronts.setdefault((cell.model, cell.task), set())
            level = cell.sparsity if MODES[cell.mode].keeps_zeros else 0.0
            models += size if level not in levels else 0
            levels.add(level)
    registered = 0
    if plan.study.registers:
        models, registered = 0, models
    return Disk(masks, adapters, models, biggest * workers, registered, _RUN_BYTES * len(plan.cells))


def check_resources(plan: Plan, bench: Workbench, folder: Path, artifacts: str | None, workers: int) -> list[str]:
    """Whether disk and memory can hold the study. One line a problem.

    Args:
        plan: a plan that `check_plan` has nothing against.
        bench: finds the models.
        folder: where the study writes.
        artifacts: URI of the tracking store's artifacts, where they are counted too if they are local.
        workers: how many work at once.
    """
    disk, problems = estimate_disk(plan, bench, workers), []
    wanted: dict[Path, int] = {_existing(folder): disk.output}
    if artifacts and urlsplit(artifacts).scheme == "file":
        place = _existing(Path(url2pathname(urlsplit(artifacts).path)))
        same = [known for known in wanted if os.stat(known).st_dev == os.stat(place).st_dev]
        place = same[0] if same else place
        wanted[place] = wanted.get(place, 0) + disk.artifacts
    for place, size in wanted.items():
        free = shutil.disk_usage(place).free
        if size > free:
            problems.append(
                f"The study may write {gigabytes(size)} to the disk of {place}, which has {gigabytes(free)} left; "
                f"keep fewer models (keep: adapter or none), or choose another output_dir."
            )
    if problem := _memory_problem(plan, bench, workers):
        problems.append(problem)
    return problems


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _note(problems: dict[str, None], check, *arguments) -> None:
    try:
        check(*arguments)
    except UserError as error:
        problems[str(error)] = None


def check_examples(cell: CellConfig, bench: Workbench) -> None:
    """Checks that training finds what it learns from: a split, answers among the choices, room for them.

    Raises:
        UserError: it does not, or the model or the task cannot be had.
    """
    from sparse_ft.tasks.examples import training_examples

    task = bench.task(cell)
    training_examples(task, bench.tokenizer(cell.model), cell.max_seq_len, limit=1, seed=cell.seed)


def _bytes(checkpoint: Checkpoint, itemsize: int) -> int:
    return itemsize * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)


def _adapter_bytes(checkpoint: Checkpoint, rank: int, chosen: tuple[str, ...] | None) -> int:
    """Adapters are saved in float32: A is [r, in], B is [out, r]."""
    shapes = [s for n, s in checkpoint.prunable_shapes().items() if role(checkpoint.config, n).is_adapted(chosen)]
    return 4 * rank * sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)


def _memory_problem(plan: Plan, bench: Workbench, workers: int) -> str | None:
    """The weights alone are what a cell cannot do without: only what certainly does not fit is refused."""
    needs = []
    for cell in plan.cells:
        device = resolve_device(cell.device)
        size = _bytes(bench.checkpoint(cell.model), resolve_dtype(cell.dtype, device).itemsize)
        needs.append((size * (1 if MODES[cell.mode].lora else 4), cell.model, device))  # full: gradients, two moments
    size, model, device = max(needs, key=lambda need: need[0])
    if device.type == "cuda":
        import torch

        per_gpu = math.ceil(workers / max(1, torch.cuda.device_count()))
        free, there = torch.cuda.mem_get_info(device)[1], "the GPU has"
        size *= per_gpu
    else:
        per_gpu = workers
        free, there = psutil.virtual_memory().total, "this machine has"
        size *= workers
    if size <= free:
        return None
    return (
        f"{per_gpu} worker(s) with {model} need at least {gigabytes(size)} of memory and {there} {gigabytes(free)}; "
        "use fewer workers (max_workers), dtype bfloat16, or a smaller model."
    )


def _existing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
