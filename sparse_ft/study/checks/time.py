"""How long a study will take, from cells like its own that were measured already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ft.progress import duration
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import named
from sparse_ft.study.plan import Plan
from sparse_ft.tracking.parameters import flatten_config

__all__ = ["Time", "estimate_time"]

# What changes the result and not the time. Of the rest the mode is dropped first, where no cell is quite alike.
_NO_MATTER = named(CellConfig, time=False)


@dataclass(frozen=True)
class Time:
    """How long the cells of a plan take.

    Attributes:
        seconds: of all cells of a kind that was measured, divided among the workers.
        workers: how many.
        measured: cells that this was taken from.
        known: cells of the plan that it counts.
        unknown: cells of a model and task of which none was measured; they are not counted.
    """

    seconds: float
    workers: int
    measured: int
    known: int
    unknown: int

    def lines(self) -> Iterator[str]:
        """For the plan."""
        if not self.measured:
            yield "time: no cell like these was measured yet; start the study, and ask again after its first cells"
            return
        yield (
            f"time: about {duration(self.seconds)} for {self.known} cells with {self.workers} worker(s), "
            f"from {self.measured} measured in this experiment"
        )
        if self.unknown:
            yield f"  and {self.unknown} cells more, of which none alike (model, task, settings) was measured yet"


def estimate_time(plan: Plan, runs: Sequence[Mapping[str, Any]], workers: int) -> Time:
    """From the FINISHED cells among ``runs``: the mean time of those with the same model, task, mode and settings,
    where there are none of those with another mode.

    Args:
        plan: what is to be run; cells that are only recorded take no time.
        runs: as `sparse_ft.tracking.runs.Tracker.search` returns them.
        workers: how many work at once.
    """
    alike: dict[tuple, list[float]] = defaultdict(list)
    roughly: dict[tuple, list[float]] = defaultdict(list)
    taken: set[tuple] = set()
    for run in runs:
        if run["tags"].get("kind") != "cell" or run["status"] != "FINISHED" or "same_as" in run["tags"]:
            continue
        values = {k.removeprefix("cfg/"): v for k, v in run["params"].items() if k.startswith("cfg/")}
        seconds = run["end_time"] - run["start_time"]
        alike[_kind(values)].append(seconds)
        roughly[_kind(values, "mode")].append(seconds)
    total, known, unknown = 0.0, 0, 0
    for cell in plan.computed:
        exact, near = _of(cell), _of(cell, "mode")
        seconds = alike.get(exact) or roughly.get(near)
        if seconds is None:
            unknown += 1
            continue
        known += 1
        total += sum(seconds) / len(seconds)
        taken.add(near if exact not in alike else exact)
    measured = sum(len(alike.get(kind) or roughly.get(kind, ())) for kind in taken)
    return Time(total / workers, workers, measured, known, unknown)


def _of(cell: CellConfig, *but: str) -> tuple:
    return _kind({k.removeprefix("cfg/"): v for k, v in flatten_config(cell.canonical()).items()}, *but)


def _kind(values: Mapping[str, str], *but: str) -> tuple:
    return tuple(sorted((name, value) for name, value in values.items() if name not in _NO_MATTER + but))
