"""A study as its YAML file says it, every value of its type."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparse_ft.cell.failures import parse_retry
from sparse_ft.errors import UserError, masked
from sparse_ft.levels import parse_levels
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import FIGURES, KEEP_FORMATS, TRAINERS, MaskConfig
from sparse_ft.settings.yaml_file import LARGEST_STUDY, read_yaml

__all__ = ["KEEP", "Study", "load_study"]

KEEP = ("none", "adapter", "pareto", "all")

_NAME = re.compile(r"\w([^/\\]{0,98}[^/\\ .])?")
_LONGEST_NAME = 200  # bytes; file systems take 255, and the folder's own files put theirs around it


@dataclass(frozen=True)
class Study:
    """A study as its YAML file says it.

    Attributes:
        name: of the parent run and of the output folder.
        grid: values of any cell fields; the cells are their product. In the file it may be a list of such tables.
        cell: values of cell fields that are the same everywhere.
        dense_baseline: add one dense cell for every (model, task, seed).
        keep: what of the models stays: none, adapter, pareto (adapters of all cells and whole models of the
            Pareto front of accuracy and sparsity) or all. Where the file does not say, pareto, or what ``cell``
            says.
        keep_format: of the whole models that are kept, plain or packed (modes that keep their zeros). Where the file
            does not say, plain, or what ``cell`` says.
        register: put the whole models that are kept into the model registry too.
        search: an Optuna search over some fields, instead of trying every point; see `sparse_ft.study.search.session`.
        retry: failure classes that are tried again on resuming beside those that always are.
        trainer: how cells are trained, one of `TRAINERS`.
        more: the further tables of the grid, each a product of its own; cells that are in several are one.
        figures: of the mask sets, as ``compute_masks`` takes it: all, summary or none; none draws none of the results
            either.
        enlarged: the file's ``on_gpu`` holds, what is run where there is a GPU.
        left_open: fields of ``cell`` that the file does not speak of, and that were decided when the study was begun.
    """

    name: str
    grid: Mapping[str, list[Any]]
    cell: Mapping[str, Any] = field(default_factory=dict)
    dense_baseline: bool = True
    keep: str = ""
    keep_format: str = ""
    register: bool = False
    search: Mapping[str, Any] | None = None
    retry: frozenset[str] = frozenset()
    trainer: str = "local"
    figures: str = MaskConfig.figures
    more: tuple[Mapping[str, list[Any]], ...] = ()
    enlarged: bool = field(default=False, metadata={"own": True})
    left_open: frozenset[str] = field(default=frozenset(), metadata={"own": True})

    @property
    def tables(self) -> tuple[Mapping[str, list[Any]], ...]:
        """The grid's tables."""
        return (self.grid, *self.more)

    @property
    def kept(self) -> str:
        """The disk policy that holds."""
        return self.keep or self.cell.get("keep") or "pareto"

    @property
    def kept_format(self) -> str:
        """The format of whole models that holds."""
        return self.keep_format or self.cell.get("keep_format") or KEEP_FORMATS[0]

    @property
    def registers(self) -> bool:
        """Whether models that are kept go into the registry."""
        return self.register or self.cell.get("register_as", "none") != "none"

    def plain(self) -> dict[str, Any]:
        """The study as plain data without passwords, for its run's ``study.yaml``."""
        grid = list(map(dict, self.tables)) if self.more else dict(self.grid)
        values = {"name": self.name, "grid": grid, "cell": dict(self.cell), "keep": self.kept}
        values |= {"dense_baseline": self.dense_baseline, "register": self.register, "search": self.search}
        if self.kept_format != KEEP_FORMATS[0]:  # what older versions' files do not say
            values["keep_format"] = self.kept_format
        if self.trainer != "local":
            values["trainer"] = self.trainer
        return json.loads(json.dumps(values), object_hook=_masked)


def load_study(path: str | Path, gpu: Callable[[str], bool] = lambda device: False) -> Study:
    """Reads a study's YAML.

    Args:
        path: the file.
        gpu: says whether a ``device`` of a cell is one, and is asked only of a file with ``on_gpu``: the answer takes
            seconds to import. Then what stands there holds, its ``grid`` instead of the file's, the fields of its
            ``cell`` before these.

    Raises:
        UserError: the file is missing, not YAML, or has keys or values that no study has.
    """
    path = Path(path)
    content = read_yaml(path)
    if isinstance(content, dict) and content.get("search"):
        content = {"grid": {}, "dense_baseline": False, **content}
    elif not isinstance(content, dict) or not all(_tables(content.get("grid")) or [None]):
        raise UserError(f"Study {path} has no 'grid:' with lists of values; configs/ holds examples.")
    content, enlarged = _for_device(path, content, gpu)
    known = {entry.name for entry in fields(Study) if not entry.metadata} - {"more"}
    unknown = sorted(map(str, set(content) - known))
    if unknown:
        raise UserError(f"Study {path}: unknown key '{unknown[0]}'; a study has {', '.join(sorted(known))}.")
    for key, words in (("keep", KEEP), ("keep_format", KEEP_FORMATS), ("trainer", TRAINERS), ("figures", FIGURES)):
        if content.get(key, words[0]) not in words:
            raise UserError(f"Study {path}: {key} is '{content[key]}'; it must be {' | '.join(words)}.")
    for switch in ("dense_baseline", "register"):
        if not isinstance(content.get(switch, False), bool):
            raise UserError(f"Study {path}: {switch} is '{content[switch]}'; it must be true or false.")
    content = _checked(path, content)
    read = ({axis: _axis(path, axis, values) for axis, values in table.items()} for table in _tables(content["grid"]))
    grid, *more = (*read,) or ({},)
    classes = content.get("retry") or "none"
    retry = parse_retry(",".join(map(str, classes)) if isinstance(classes, list) else str(classes))
    said = {"grid": grid, "more": tuple(more), "cell": content.get("cell") or {}, "retry": retry}
    return Study(**{**content, **said}, enlarged=enlarged)


def _for_device(path: Path, content: Mapping[str, Any], gpu: Callable[[str], bool]) -> tuple[dict[str, Any], bool]:
    """The content without ``on_gpu``, or with it where there is a GPU; and whether there it is another study.

    Raises:
        UserError: ``on_gpu`` is no table of grid and cell.
    """
    plain = {key: value for key, value in content.items() if key != "on_gpu"}
    if "on_gpu" not in content:
        return plain, False
    larger = content["on_gpu"]
    if not isinstance(larger, dict) or not larger or set(larger) - {"grid", "cell"}:
        raise UserError(f"Study {path}: on_gpu is no table of grid and cell, which are what another device may change.")
    parts = [plain.get("cell") or {}, larger.get("cell") or {}]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"Study {path}: cell is no table of fields and values.")
    if not gpu(str(parts[0].get("device", CellConfig.device))):
        return plain, False
    if not all(_tables(larger.get("grid", plain.get("grid"))) or [None]):
        raise UserError(f"Study {path}: on_gpu has no 'grid:' with lists of values.")
    return {**plain, **larger, "cell": parts[0] | parts[1]}, True


def _checked(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a name that is text, every part of its type; the grid's values are lists of plain values.

    Raises:
        UserError: the first that is wrong.
    """
    name = content.get("name", path.stem)
    if isinstance(name, bool) or not isinstance(name, (str, int, float)) or not _names_a_folder(str(name)):
        raise UserError(
            f"Study {path}: name is '{str(name)[:60]}'; it names a folder: 1 to 100 letters that can be seen, without /"
            " and \\, beginning with a letter or digit and not ending with a space or dot."
        )
    grid = _tables(content.get("grid"))
    for part, tables in (("grid", grid), ("cell", [content.get("cell")]), ("search", [content.get("search")])):
        for table in tables:
            if not isinstance(table or {}, dict):
                raise UserError(f"Study {path}: {part} is no table of fields and values.")
            if odd := [key for key in table or {} if not isinstance(key, str)]:
                raise UserError(f"Study {path}: {part} has the key {str(odd[0])[:60]}, which is no field's name.")
    for axis, values in (item for table in grid for item in table.items()):
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, (str, int, float)):
                raise UserError(f"Study {path}: the axis '{axis}' holds {str(value)[:60]}, which is no plain value.")
    cells = sum(math.prod(len(v) if isinstance(v, list) else 1 for v in table.values()) for table in grid)
    if cells > LARGEST_STUDY:
        raise UserError(f"Study {path} has {cells:,} cells; the most are {LARGEST_STUDY:,}. Divide its grid.")
    return {**content, "name": str(name), "grid": grid}


def _tables(grid: Any) -> list[Any]:
    """A grid's tables: of a list each entry, else the one; none of none."""
    return grid if isinstance(grid, list) else [grid] if grid else []


def _masked(values: dict[str, Any]) -> dict[str, Any]:
    return {name: masked(value) if isinstance(value, str) else value for name, value in values.items()}


def _names_a_folder(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name.isprintable() and len(name.encode()) <= _LONGEST_NAME


def _axis(path: Path, axis: str, values: Any) -> list[Any]:
    if axis == "sparsity" and isinstance(values, str):
        return list(parse_levels(values))
    values = values if isinstance(values, list) else [values]
    if not values:
        raise UserError(f"Study {path}: the axis '{axis}' of the grid is empty.")
    return values
