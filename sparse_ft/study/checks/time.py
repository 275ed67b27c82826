"""How long a study will take, from cells like its own that were measured already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from sparse_ft.progress import duration
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.field import named
from sparse_ft.study.plan import Plan
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Kind, Run

__all__ = ["estimate_time"]

# What changes the result and not the time. Of the rest the mode is dropped first, where no cell is quite alike.
_NO_MATTER = named(CellConfig, time=False)


def estimate_time(plan: Plan, runs: Sequence[Run], workers: int) -> Iterator[str]:
    """How long a plan takes, in words, from the FINISHED cells among ``runs``: the mean time of those with the same
    model, task, mode and settings, where there are none of those with another mode. Cells like none are not counted.

    Args:
        plan: what is to be run; cells that are only recorded take no time.
        runs: of an experiment, of whatever kind.
        workers: how many work at once.
    """
    measured: dict[tuple, list[float]] = defaultdict(list)
    for run in runs:
        if run.kind != Kind.CELL or not run.is_finished or run.same_as is not None:
            continue
        for kind in _kinds(run.params):
            measured[kind].append(run.seconds)
    found = [next(filter(measured.__contains__, _kinds(flatten_config(cell.canonical()))), None)
             for cell in plan.computed]  # fmt: skip
    known = [kind for kind in found if kind is not None]
    if not known:
        yield "time: no cell like these was measured yet; start the study, and ask again after its first cells"
        return
    seconds = sum(sum(measured[kind]) / len(measured[kind]) for kind in known) / workers
    yield (
        f"time: about {duration(seconds)} for {len(known)} cells with {workers} worker(s), "
        f"from {sum(len(measured[kind]) for kind in set(known))} measured in this experiment"
    )
    if unknown := len(found) - len(known):
        yield f"  and {unknown} cells more, of which none alike (model, task, settings) was measured yet"


def _kinds(params: Mapping[str, str]) -> tuple[tuple, tuple]:
    """What the time of a cell depends on, with its mode and without."""
    settings = sorted((name.removeprefix("cfg/"), value) for name, value in params.items() if name.startswith("cfg/"))
    exact = tuple((name, value) for name, value in settings if name not in _NO_MATTER)
    return exact, tuple((name, value) for name, value in exact if name != "mode")
