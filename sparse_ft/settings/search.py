"""How to search: the ``search:`` of a study's YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.settings.parser import Parser

__all__ = ["OBJECTIVES", "SearchSettings"]

# objective -> (metric, direction) of each of its values
OBJECTIVES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "loss": (("eval/loss", "minimize"),),
    "accuracy": (("eval/accuracy", "maximize"),),
    "accuracy_sparsity": (("eval/accuracy", "maximize"), ("sparsity/after_merge", "maximize")),
}


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Args:
        space: cell field -> a list of choices, or a range {low, high, log, step}.
        trials: how many.
        objective: loss (lower is better), accuracy, or accuracy_sparsity (both, NSGA-II).
        first_rung: optimizer steps after which a trial may be stopped for the first time; 0 never stops one.
        reduction_factor: of the trials at a rung one in so many goes on; the next rung is so many times later.
        seed: of the sampler.
        storage: database of the trials, or none for a file in the study's folder.
    """

    space: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 20
    objective: str = "loss"
    first_rung: int = 0
    reduction_factor: int = 3
    seed: int = 0
    storage: str = "none"

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> SearchSettings:
        """The settings of a study's ``search:``.

        Raises:
            UserError: an unknown key, or a value that no search has.
        """
        known = {entry.name: entry for entry in fields(cls)}
        values = dict(values)
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{where}: search has no '{name}'; it has {', '.join(known)}.")
            if known[name].type != "int":
                continue
            if isinstance(value, float) and value.is_integer():
                values[name] = value = int(value)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
                raise UserError(f"{where}: search.{name} is '{value}'; it must be a whole number, 0 or more.")
        settings = cls(**values)
        if settings.objective not in OBJECTIVES:
            raise UserError(f"{where}: search.objective is '{settings.objective}'; choose {' | '.join(OBJECTIVES)}.")
        if settings.trials < 1 or settings.reduction_factor < 2:
            raise UserError(f"{where}: search needs trials of 1 or more and a reduction_factor of 2 or more.")
        if settings.first_rung and len(OBJECTIVES[settings.objective]) > 1:
            raise UserError(f"{where}: Optuna stops no trial of a search with two objectives; leave first_rung out.")
        if not isinstance(settings.space, Mapping) or not settings.space:
            raise UserError(f"{where}: search.space is empty; give lists of choices, or ranges with low and high.")
        return replace(settings, space={name: _axis(name, axis, where) for name, axis in settings.space.items()})

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a trial is judged by."""
        return tuple(metric for metric, _ in OBJECTIVES[self.objective])

    @property
    def directions(self) -> tuple[str, ...]:
        """``minimize`` or ``maximize``, one for each metric."""
        return tuple(direction for _, direction in OBJECTIVES[self.objective])

    @property
    def choices(self) -> dict[str, list[Any]]:
        """The axes that are lists."""
        return {name: list(axis) for name, axis in self.space.items() if isinstance(axis, list)}

    def rungs(self, max_steps: int) -> tuple[int, ...]:
        """The optimizer steps after which a trial of ``max_steps`` may be stopped."""
        steps, step = [], self.first_rung
        while 0 < step < max_steps:
            steps.append(step)
            step *= self.reduction_factor
        return tuple(steps)


def _axis(name: str, axis: Any, where: str) -> Any:
    """An axis with its values as the field has them.

    Raises:
        UserError: no field of that name, values that it cannot have, choices that repeat, a range that is none.
    """
    parser, where = Parser(CellConfig), f"{where}, search.space"
    if isinstance(axis, list) and axis:
        choices = [plain_values(parser.values({name: value}, where))[name] for value in axis]
        if len(set(choices)) < len(choices):
            raise UserError(f"{where}: {name} has a choice twice: {axis}.")
        return choices
    if not (isinstance(axis, Mapping) and {"low", "high"} <= set(axis) <= {"low", "high", "log", "step"}):
        raise UserError(f"{where}.{name} must be a list of choices, or a range with low and high.")
    parser.values({name: plain_values(CellConfig()).get(name)}, where)  # is there such a field at all?
    if not parser.is_number(name):
        raise UserError(f"{where}: {name} is no number, which alone has a range; give a list of choices.")
    if name == "sparsity":
        raise UserError(f"{where}.sparsity must be a list: masks are made for each level once.")
    if not isinstance(axis.get("log", False), bool):
        raise UserError(f"{where}: {name}.log is '{axis['log']}'; it must be true or false.")
    of, ends = (int if parser.is_count(name) else float), {}
    for end in ("low", "high", "step"):
        value = axis.get(end)
        if end == "step" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: {name}.{end} is '{value}'; it must be a number.")
        if of is int and value != int(value):
            raise UserError(f"{where}: {name}.{end} is {value}; it must be a whole number.")
        ends[end] = of(value)
        if end != "step":
            parser.values({name: ends[end]}, where)
    if not ends["low"] < ends["high"]:
        raise UserError(f"{where}: {name}: low must be below high; they are {ends['low']:g} and {ends['high']:g}.")
    if "step" in ends and (axis.get("log", False) or not 0 < ends["step"] <= ends["high"] - ends["low"]):
        raise UserError(f"{where}: {name}.step must be above 0 and fit into the range, and goes without log.")
    if axis.get("log", False) and ends["low"] <= 0:
        raise UserError(f"{where}: {name}: a logarithmic range begins above 0, not at {ends['low']:g}.")
    return {**ends, "log": axis.get("log", False)}
