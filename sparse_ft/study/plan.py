"""From a study's YAML to its cells, and to the mask sets that they share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from sparse_ft.cell.failures import parse_retry
from sparse_ft.cell.masks import mask_file
from sparse_ft.errors import UserError
from sparse_ft.levels import parse_levels
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import FIGURES, TRAINERS, MaskConfig
from sparse_ft.settings.field import defaults
from sparse_ft.settings.modes import DENSE, MODES
from sparse_ft.settings.parser import Parser
from sparse_ft.settings.pruning import RecipeSettings
from sparse_ft.settings.yaml_file import read_yaml
from sparse_ft.study.study_file import check_study

KEEP = ("none", "adapter", "pareto", "all")

__all__ = ["KEEP", "MaskSetPlan", "Plan", "Study", "load_study", "make_plan"]


@dataclass(frozen=True)
class Study:
    """A study as its YAML file says it.

    Attributes:
        name: of the parent run and of the output folder.
        grid: values of any cell fields; the cells are their product.
        cell: values of cell fields that are the same everywhere.
        dense_baseline: add one dense cell for every (model, task, seed).
        keep: what of the models stays: none, adapter, pareto (adapters of all cells and whole models of the
            Pareto front of accuracy and sparsity) or all. Where the file does not say, pareto, or what ``cell``
            says.
        register: put the whole models that are kept into the model registry too.
        search: an Optuna search over some fields, instead of trying every point; see `sparse_ft.study.search.session`.
        figures: of the mask sets, as ``compute_masks`` takes it: all, summary or none.
        retry: failure classes that are tried again on resuming beside those that always are.
        trainer: how cells are trained, one of `TRAINERS`.
    """

    name: str
    grid: Mapping[str, list[Any]]
    cell: Mapping[str, Any] = field(default_factory=dict)
    dense_baseline: bool = True
    keep: str = ""
    register: bool = False
    search: Mapping[str, Any] | None = None
    retry: frozenset[str] = frozenset()
    trainer: str = "local"
    figures: str = MaskConfig.figures

    @property
    def kept(self) -> str:
        """The disk policy that holds."""
        return self.keep or self.cell.get("keep") or "pareto"

    @property
    def registers(self) -> bool:
        """Whether models that are kept go into the registry."""
        return self.register or self.cell.get("register_as", "none") != "none"


@dataclass(frozen=True)
class MaskSetPlan:
    """One run of the mask engine: all levels that some cells need of the same kind of mask."""

    config: MaskConfig

    @property
    def name(self) -> str:
        """For people. The folder's name carries the identity too: see `sparse_ft.cell.identity.mask_key`."""
        config = self.config
        parts = [config.model.rstrip("/").split("/")[-1], config.label]
        if config.method != "random":
            parts += [config.importance, config.scope]
        parts += [f"{config.other_update}-update"] if config.other_update else []
        parts += [config.allocation] if config.allocation != "uniform" else []
        parts += [config.task] if config.needs_calibration else []
        parts += [f"seed{config.seed}"] if config.seed != 0 else []
        return "_".join(parts)


@dataclass(frozen=True)
class Plan:
    """All work of a study. ``mask_sets[i]`` serves the cells whose entry in ``mask_set_of`` is i (None: no masks);
    ``same_as[i]`` is the number of the cell that computes the same as cell i (None: it runs itself)."""

    study: Study
    cells: tuple[CellConfig, ...]
    mask_sets: tuple[MaskSetPlan, ...]
    mask_set_of: tuple[int | None, ...]
    same_as: tuple[int | None, ...]

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """A name for every cell: its title, and the study's axes of which a title does not speak."""
        shown = ("model", "task", "method", "importance", "update", "sparsity", "mode")
        axes = [axis for axis, values in self.study.grid.items() if len(values) > 1 and axis not in shown]
        names = []
        for cell in self.cells:
            values = cell.canonical()
            rest = [f"{axis} {values[axis]}" for axis in axes if values.get(axis, "none") != "none"]
            names.append(" · ".join([cell.title, *([", ".join(rest)] if rest else [])]))
        return tuple(names)


def load_study(path: str | Path) -> Study:
    """Reads a study's YAML.

    Raises:
        UserError: the file is missing, not YAML, or has keys or values that no study has.
    """
    path = Path(path)
    content = read_yaml(path)
    if isinstance(content, dict) and content.get("search"):
        content = {"grid": {}, "dense_baseline": False, **content}
    elif not isinstance(content, dict) or not isinstance(content.get("grid"), dict) or not content["grid"]:
        raise UserError(f"Study {path} has no 'grid:' with lists of values; configs/ holds examples.")
    known = {entry.name for entry in fields(Study)}
    unknown = sorted(map(str, set(content) - known))
    if unknown:
        raise UserError(f"Study {path}: unknown key '{unknown[0]}'; a study has {', '.join(sorted(known))}.")
    for key, words in (("keep", KEEP), ("trainer", TRAINERS), ("figures", FIGURES)):
        if content.get(key, words[0]) not in words:
            raise UserError(f"Study {path}: {key} is '{content[key]}'; it must be {' | '.join(words)}.")
    for switch in ("dense_baseline", "register"):
        if not isinstance(content.get(switch, False), bool):
            raise UserError(f"Study {path}: {switch} is '{content[switch]}'; it must be true or false.")
    content = check_study(path, content)
    grid = {axis: _axis(path, axis, values) for axis, values in content["grid"].items()}
    classes = content.get("retry") or "none"
    retry = parse_retry(",".join(map(str, classes)) if isinstance(classes, list) else str(classes))
    return Study(**{**content, "grid": grid, "cell": content.get("cell") or {}, "retry": retry})


def make_plan(study: Study) -> Plan:
    """The cells of a study in the order they run, dense baselines first, each cell once.

    Raises:
        UserError: a field or value that no cell has.
    """
    where, parser = f"Study {study.name}", Parser(CellConfig)
    common, described = parser.values(study.cell, where), cache(lambda path: mask_file(path).described)
    # Every axis value is checked once, not once a cell.
    axes = [[getattr(parser.values({axis: v}, where), axis) for v in values] for axis, values in study.grid.items()]
    points = [replace(common, **dict(zip(study.grid, values, strict=True))) for values in itertools.product(*axes)]
    dense = [replace(point, mode=DENSE.name) for point in points] if study.dense_baseline else []
    cells: dict[str, CellConfig] = {}
    for cell in dense + points:
        if not 0 <= cell.sparsity <= 1:
            raise UserError(f"{where}: sparsity is {cell.sparsity}; it must lie between 0 and 1.")
        # Of a model trained without an adapter the whole is all there is to keep.
        whole = study.kept == "all" or (study.kept == "pareto" and not MODES[cell.mode].lora)
        kept = "none" if study.kept == "none" else "all" if whole else "adapter"
        if cell.pruned and cell.masks is not None:
            cell = replace(cell, **described(cell.masks))
        cells.setdefault(cell.key(), replace(cell, keep=kept, register_as=None))

    sets: dict[MaskConfig, list[float]] = {}
    kinds = []
    for cell in cells.values():
        kind = mask_set_of(cell)
        kinds.append(kind)
        if kind is not None:
            sets.setdefault(kind, []).append(cell.sparsity)
    order = list(sets)
    plans = []
    for kind, levels in sets.items():
        plans.append(MaskSetPlan(replace(kind, sparsities=tuple(sorted(set(levels))), figures=study.figures)))
    numbers = tuple(None if kind is None else order.index(kind) for kind in kinds)
    return Plan(study, tuple(cells.values()), tuple(plans), numbers, _same_as(list(cells.values())))


def _same_as(cells: list[CellConfig]) -> tuple[int | None, ...]:
    """At 0 % every mask keeps all weights, so method and importance make no difference, nor does it matter
    whether an adapter over a base without zeros is called sparse: such cells are one computation."""
    seen: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        if cell.sparsity == 0 and cell.masks is None and cell.pruned and MODES[cell.mode].lora:
            alike = replace(cell, **defaults(RecipeSettings), mode=CellConfig.mode)
            seen.setdefault(alike.key(), []).append(number)
    result: list[int | None] = [None] * len(cells)
    for numbers in seen.values():
        # The one that runs keeps its promise weight by weight.
        first = min(numbers, key=lambda number: (not MODES[cells[number].mode].keeps_zeros, number))
        for number in numbers:
            result[number] = None if number == first else first
    return tuple(result)


def _axis(path: Path, axis: str, values: Any) -> list[Any]:
    if axis == "sparsity" and isinstance(values, str):
        return list(parse_levels(values))
    values = values if isinstance(values, list) else [values]
    if not values:
        raise UserError(f"Study {path}: the axis '{axis}' of the grid is empty.")
    return values
