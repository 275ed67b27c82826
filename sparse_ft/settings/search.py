"""How to search: the ``search:`` of a study's YAML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import Settings, plain_values, setting
from sparse_ft.settings.parser import Parser

__all__ = ["OBJECTIVES", "SearchSettings"]

# objective -> (metric, direction) of each of its values
OBJECTIVES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "loss": (("eval/loss", "minimize"),),
    "accuracy": (("eval/accuracy", "maximize"),),
    "accuracy_sparsity": (("eval/accuracy", "maximize"), ("sparsity/after_merge", "maximize")),
}


@dataclass(frozen=True)
class SearchSettings(Settings):
    """How to search.

    Attributes:
        space: cell field -> a list of choices, or a range {low, high, log, step}.
    """

    space: Mapping[str, Any] | None = setting(None, "what is varied.", flag=False)
    trials: int = setting(20, "how many.", least=1)
    objective: str = setting("loss", "lower loss, higher accuracy, or both accuracy and sparsity.", choices=OBJECTIVES)
    first_rung: int = setting(
        0, "optimizer steps after which a trial may be stopped for the first time; 0 never stops one.", least=0
    )
    reduction_factor: int = setting(
        3, "of the trials at a rung one in so many goes on; the next rung is so many times later.", least=2
    )
    seed: int = setting(0, "of the sampler.", least=0)
    storage: str | None = setting(None, "database of the trials, or none for a file in the study's folder.")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.first_rung and len(OBJECTIVES.get(self.objective, ())) > 1:
            yield "Optuna stops no trial of a search with two objectives; leave first_rung out."
        if not isinstance(self.space, Mapping) or not self.space:
            yield "space is empty; give lists of choices, or ranges with low and high."

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> SearchSettings:
        """The settings of a study's ``search:``.

        Raises:
            UserError: an unknown key, or a value that no search has.
        """
        where, space = f"{where}, search", values.get("space")
        rest = {name: value for name, value in values.items() if name != "space"}
        settings = replace(Parser(cls).values(rest, where), space=space)
        if problems := list(settings.problems()):
            raise UserError(f"{where}: {' '.join(problems)}")
        return replace(settings, space={name: _axis(name, axis, where) for name, axis in space.items()})

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
    parser, where = Parser(CellConfig), f"{where}.space"
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
