"""From a study to its cells, and to the mask sets that they share."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from sparse_ft.cell.identity import cell_identity, mask_key
from sparse_ft.cell.masks import mask_file
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError, masked
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.field import defaults
from sparse_ft.settings.modes import DENSE, MODES
from sparse_ft.settings.parser import Parser
from sparse_ft.settings.pruning import RecipeSettings
from sparse_ft.settings.rules import STEPS
from sparse_ft.settings.scoring import TASK_TEXT
from sparse_ft.study.study_file import Study

__all__ = ["Plan", "PlannedCell", "PlannedMasks", "make_plan"]


@dataclass(frozen=True)
class PlannedMasks:
    """One run of the mask engine: all levels that some cells need of the same kind of mask.

    Attributes:
        config: what masks.
        key: identity of what they are made from; empty until `Plan.identified`.
    """

    config: MaskConfig
    key: str = ""

    @property
    def name(self) -> str:
        """For people. The folder's name carries the identity too: see `sparse_ft.cell.identity.mask_key`."""
        config = self.config
        parts = [config.model.rstrip("/").split("/")[-1], config.label]
        if config.method != "random":
            parts += [config.importance, config.scope]
        parts += [f"{value}-{step}" for step, value in config.steps.items()]
        parts += [config.allocation] if config.allocation != "uniform" else []
        if config.needs_calibration:
            parts += [config.task] if config.calibration_corpus == TASK else [Path(config.calibration_corpus).stem]
        parts += [f"seed{config.seed}"] if config.seed != 0 else []
        return "_".join(parts)


@dataclass(frozen=True)
class PlannedCell:
    """One cell of a plan.

    Attributes:
        config: what it computes, by name.
        title: its name in this study: the cell's own, and the study's axes of which that does not speak.
        masks: number of its mask set in the plan; None: it needs none, or a file is given.
        teacher: number of the dense cell whose fine-tuned model teaches it; None: none does.
        same_as: number of the cell in the plan that computes the same; None: it runs itself.
        identity: what its names stand for; empty until `Plan.identified`.
    """

    config: CellConfig
    title: str
    masks: int | None = None
    same_as: int | None = None
    teacher: int | None = None
    identity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All work of a study: its cells in the order they run, and the mask sets that they share."""

    study: Study
    cells: tuple[PlannedCell, ...]
    mask_sets: tuple[PlannedMasks, ...]

    @property
    def configs(self) -> tuple[CellConfig, ...]:
        """What each cell computes."""
        return tuple(cell.config for cell in self.cells)

    @property
    def computed(self) -> tuple[CellConfig, ...]:
        """The cells that run themselves."""
        return tuple(cell.config for cell in self.cells if cell.same_as is None)

    @property
    def key(self) -> str:
        """SHA-256 (16 hex digits) over the cells, by name, so that the same study is known again, whatever was decided
        of what it leaves open."""
        search = masked(json.dumps(self.study.search, sort_keys=True))  # a changed password is no other study
        usual = {name: value for name, value in TASK_TEXT.items() if name in self.study.left_open}
        keys = sorted(replace(config, **usual).key() for config in self.configs)
        text = json.dumps([self.study.name, search, keys])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def identified(self, bench: Workbench) -> Plan:
        """The plan with what the names of its cells and mask sets stand for on this machine.

        Raises:
            UserError: a model, a task, a mask file or a text that cannot be had.
        """
        cells = [replace(cell, identity=cell_identity(cell.config, bench, self.study.trainer)) for cell in self.cells]
        mask_sets = [replace(item, key=mask_key(item.config, bench)) for item in self.mask_sets]
        return replace(self, cells=tuple(cells), mask_sets=tuple(mask_sets))


def make_plan(study: Study) -> Plan:
    """The cells of a study in the order they run, dense baselines first, each cell once.

    Raises:
        UserError: a field or value that no cell has.
    """
    where, parser = f"Study {study.name}", Parser(CellConfig)
    common, given = parser.values(study.cell, where), cache(mask_file)
    # Every axis value is checked once, not once a cell.
    points = []
    for table in study.tables:
        axes = [[getattr(parser.values({axis: v}, where), axis) for v in values] for axis, values in table.items()]
        points += [replace(common, **dict(zip(table, values, strict=True))) for values in itertools.product(*axes)]
    dense = [_baseline(point) for point in points if study.dense_baseline or point.has_tuned_teacher]
    cells: dict[str, CellConfig] = {}
    packing = "plain" if study.registers else study.kept_format
    for cell in dense + points:
        if not 0 <= cell.sparsity <= 1:
            raise UserError(f"{where}: sparsity is {cell.sparsity}; it must lie between 0 and 1.")
        # Of a model trained without an adapter the whole is all there is to keep.
        whole = study.kept == "all" or (study.kept == "pareto" and not MODES[cell.mode].lora)
        kept = "none" if study.kept == "none" else "all" if whole else "adapter"
        if cell.pruned and cell.masks is not None:
            cell = given(cell.masks).settle(cell)
        cells.setdefault(cell.key(), replace(cell, keep=kept, keep_format=packing, register_as=None).settled())

    for key in {_baseline(cell).key() for cell in cells.values() if cell.has_tuned_teacher}:
        if cells[key].keep == "none":  # its model is made of its adapter
            cells[key] = replace(cells[key], keep="adapter")
    configs = list(cells.values())
    kinds = [mask_set_of(cell) for cell in configs]
    levels: dict[MaskConfig, list[float]] = {}
    for cell, kind in zip(configs, kinds, strict=True):
        if kind is not None:
            levels.setdefault(kind, []).append(cell.sparsity)
    numbers = {kind: number for number, kind in enumerate(levels)}
    named = dict.fromkeys(axis for table in study.tables for axis in table)
    varied = [axis for axis in named if len({repr(getattr(point, axis)) for point in points}) > 1]
    planned = zip(configs, _titles(configs, varied), map(numbers.get, kinds), _same_as(configs), strict=True)
    sets = [
        PlannedMasks(replace(kind, sparsities=tuple(sorted(set(asked))), figures=study.figures))
        for kind, asked in levels.items()
    ]
    places = {key: number for number, key in enumerate(cells)}
    teachers = (places[_baseline(cell).key()] if cell.has_tuned_teacher else None for cell in configs)
    made = (PlannedCell(*values, teacher) for values, teacher in zip(planned, teachers, strict=True))
    return Plan(study, tuple(made), tuple(sets))


def _baseline(cell: CellConfig) -> CellConfig:
    """What a cell is measured against: the dense model, fine-tuned if the cell is."""
    if MODES[cell.mode].trains:
        return replace(cell, mode=DENSE.name)
    return replace(cell, **defaults(RecipeSettings), masks=None, sparsity=0.0)


def _titles(cells: Sequence[CellConfig], varied: Sequence[str]) -> Iterator[str]:
    shown = ("model", "task", "method", "importance", *STEPS, "sparsity", "mode")
    axes = [axis for axis in varied if axis not in shown]
    for cell in cells:
        values = cell.canonical()
        rest = [f"{axis} {values[axis]}" for axis in axes if values.get(axis, "none") != "none"]
        yield " · ".join([cell.title, *([", ".join(rest)] if rest else [])])


def _same_as(cells: Sequence[CellConfig]) -> list[int | None]:
    """At 0 % every mask keeps all weights, so method and importance make no difference, nor does it matter
    whether an adapter over a base without zeros is called sparse: such cells are one computation."""
    seen: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        mode = MODES[cell.mode]
        if cell.sparsity == 0 and cell.masks is None and cell.pruned and not mode.trains_weights:
            alike = replace(cell, **defaults(RecipeSettings), mode=CellConfig.mode if mode.trains else cell.mode)
            seen.setdefault(alike.key(), []).append(number)
    result: list[int | None] = [None] * len(cells)
    for numbers in seen.values():
        # The one that runs keeps its promise weight by weight.
        first = min(numbers, key=lambda number: (not MODES[cells[number].mode].keeps_zeros, number))
        for number in numbers:
            result[number] = None if number == first else first
    return result
