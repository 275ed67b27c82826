"""How much a study may write, from the shapes of its models, and whether the disks have room for it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sparse_ft.cell.teacher import teacher_model
from sparse_ft.cell.workbench import Workbench
from sparse_ft.masks.files import HEADER_ROOM
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import itemsize
from sparse_ft.models.names import role
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.field import part_of
from sparse_ft.settings.lora import LoraSettings
from sparse_ft.settings.modes import DENSE, MODES
from sparse_ft.settings.recovery import RecoverySettings
from sparse_ft.settings.rules import EXPERTS
from sparse_ft.study.plan import Plan

__all__ = ["Disk", "disk_problems", "estimate_disk", "gigabytes", "model_bytes"]

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
    recovered: int = 0
    teachers: int = 0

    @property
    def output(self) -> int:
        return self.masks + self.models + self.recovered + self.teachers + self.passing

    @property
    def artifacts(self) -> int:
        return self.masks + self.adapters + self.registered + self.runs

    def lines(self) -> Iterator[str]:
        """For the plan."""
        yield f"disk: at most {gigabytes(self.output)} in the output folder, {gigabytes(self.artifacts)} of artifacts"
        yield (
            f"  masks {gigabytes(self.masks)} in each, adapters {gigabytes(self.adapters)}, whole models "
            f"{gigabytes(self.models + self.registered)}, "
            + (f"recovered models {gigabytes(self.recovered)}, " if self.recovered else "")
            + (f"teachers {gigabytes(self.teachers)}, " if self.teachers else "")
            + f"and {gigabytes(self.passing)} while cells run"
        )


def estimate_disk(plan: Plan, bench: Workbench, workers: int) -> Disk:
    """The most that the plan can write under its keep policy, computed from the models' shapes.

    Of the Pareto front it is not known beforehand how many models it has: one per sparsity is the most.
    """
    masks = adapters = models = 0
    recovered: dict[Any, int] = {}
    teachers: dict[Any, int] = {}  # those that are made again of runs
    biggest = 0
    fronts: dict[tuple[str, str], set[float]] = {}
    for item in plan.mask_sets:
        shapes = bench.checkpoint(item.config.model).prunable_shapes().values()
        packed = sum(math.prod(shape[:-1]) * math.ceil(shape[-1] / 8) for shape in shapes)
        masks += (packed + HEADER_ROOM) * len(item.config.levels)
    for cell in plan.computed:
        checkpoint = bench.checkpoint(cell.model)
        size = model_bytes(cell, bench)
        # Of experts' cells the checkpoint that they begin with, which is no larger, is there too.
        biggest = max(biggest, 2 * size if cell.pruned and cell.method == EXPERTS else size)
        if cell.measure:  # forms that are written to be measured
            biggest = max(biggest, 3 * size)
        if cell.recovered:  # cells that begin with one share it
            begin = cell.model, mask_set_of(cell), cell.masks, cell.sparsity, cell.task
            how = (*part_of(RecoverySettings, cell).values(), *part_of(LoraSettings, cell).values(), cell.seed)
            recovered[begin, how, MODES[cell.mode].trains_weights] = size
        if cell.has_tuned_teacher:
            teachers[replace(cell, mode=DENSE.name).key()] = size
        elif cell.has_teacher and cell.teacher_run:
            teachers[cell.teacher_run] = model_bytes(replace(cell, model=teacher_model(cell, bench)), bench)
        if cell.keep != "none" and MODES[cell.mode].lora:
            adapters += _adapter_bytes(checkpoint, cell.lora_r, cell.target_modules)
        if cell.keep == "all":
            models += _kept_bytes(cell, checkpoint, size)
        elif plan.study.kept == "pareto":
            levels = fronts.setdefault((cell.model, cell.task), set())
            level = cell.sparsity if MODES[cell.mode].keeps_zeros else 0.0
            models += size if level not in levels else 0
            levels.add(level)
    registered = 0
    if plan.study.registers:
        models, registered = 0, models
    runs = _RUN_BYTES * len(plan.cells)
    shared = sum(recovered.values()), sum(teachers.values())
    return Disk(masks, adapters, models, biggest * workers, registered, runs, *shared)


def disk_problems(plan: Plan, bench: Workbench, folder: Path, artifacts: str | None, workers: int) -> list[str]:
    """Whether the disks can hold the study. One line a disk that cannot.

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
    return problems


def model_bytes(cell: CellConfig, bench: Workbench) -> int:
    """Size of the cell's whole model in its dtype."""
    checkpoint = bench.checkpoint(cell.model)
    return itemsize(cell.dtype, cell.device) * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)


def _kept_bytes(cell: CellConfig, checkpoint: Checkpoint, size: int) -> int:
    """Bytes of a model that stays whole; packed, of masks that have the asked sparsity to the weight."""
    exact = cell.method in ("unstructured", "random", "semi_structured")
    if cell.keep_format != "packed" or not (cell.pruned and exact and MODES[cell.mode].keeps_zeros):
        return size
    every = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    shapes = checkpoint.prunable_shapes().values()
    bits = sum(math.prod(shape[:-1]) * math.ceil(shape[-1] / 8) for shape in shapes)
    gone = cell.sparsity * sum(map(math.prod, shapes))
    return math.ceil(size - gone * size / every) + bits


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _adapter_bytes(checkpoint: Checkpoint, rank: int, chosen: tuple[str, ...] | None) -> int:
    """Adapters are saved in float32: A is [r, in], B is [out, r]."""
    shapes = [s for n, s in checkpoint.prunable_shapes().items() if role(checkpoint.config, n).is_adapted(chosen)]
    return 4 * rank * sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
