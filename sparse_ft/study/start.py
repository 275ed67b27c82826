"""Starts a study or resumes one, so that each has one driver, and says what has changed since it was begun."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_ft.cell.failures import parse_retry
from sparse_ft.cell.identity import plan_identity
from sparse_ft.errors import UserError
from sparse_ft.files import load_yaml
from sparse_ft.processes import driver_name
from sparse_ft.settings.command_line import command_line
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.heartbeat import living_driver
from sparse_ft.study.ledger import Ledger, read_ledger
from sparse_ft.study.plan import Plan
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Kind, Run, Tag
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import store_lock

__all__ = ["STUDY_FILE", "Start", "changes", "start_study"]

_SETTLING = 1.0  # seconds in which whoever starts at the same moment is seen on a server
STUDY_FILE, _IDENTITY_FILE = "study.yaml", "identity.yaml"


@dataclass(frozen=True)
class Start:
    """The study's run, its folder, what was done under it before, and this start's name in the store."""

    parent: str
    folder: Path
    ledger: Ledger
    driver: str = ""


def start_study(tracker: Tracker, plan: Plan, config: SweepConfig, console: Console) -> Start:
    """A new study's run, or that of the one to resume; from here on it is this driver's alone.

    Raises:
        UserError: somebody drives the same study, or the one to resume; a failure class that does not exist.
    """
    name, mine, asked = plan.study.name, driver_name(), parse_retry(config.retry) | plan.study.retry
    claim = {Tag.PLAN_KEY: plan.key, Tag.DRIVER: mine, Tag.HEARTBEAT: time.time(), Tag.COMPLETE: False}
    with store_lock(tracker.uri):  # two that start at once: the second one finds the first
        resumed = _unfinished(tracker, plan.key) if config.resume is None else config.resume
        if resumed in (None, "new"):
            parent, ledger, folder = tracker.start(name, {Tag.KIND: Kind.STUDY, **claim}), Ledger(), ""
        else:
            parent = resumed
            ledger, folder = _take_over(tracker, parent)
            tracker.log(parent, tags=claim)
            tracker.reopen(parent)
    _check_alone(tracker, parent, mine, plan.key if resumed is None else None)
    ledger.asked = asked
    start = Start(parent, Path(folder or Path(config.output_dir) / f"{name}-{parent[:8]}"), ledger, mine)
    study, identity = plan.study.plain(), plan_identity(plan.configs, [cell.identity for cell in plan.cells])
    if resumed in (None, "new"):
        tracker.log(parent, params={"cfg/study": name, "cfg/cells": len(plan.cells)})
        text = Path(config.config).read_text(encoding="utf-8", errors="replace")
        tracker.log_text(parent, text, Path(config.config).name)  # as it was written, but for passwords
    else:
        for line in _resumed(tracker, start, plan, study, identity):
            console.print(line, highlight=False, soft_wrap=True)
        if adopted := tracker.adopted:  # the run that `mlflow run` made for this start
            tracker.log(adopted, tags={Tag.KIND: Kind.RESUME, Tag.RESUMES: parent})
    command = command_line("sweep", config, ("resume",))
    tracker.log_dict(parent, study, STUDY_FILE)
    tracker.log_dict(parent, identity, _IDENTITY_FILE)
    tracker.log(parent, tags={Tag.FOLDER: str(start.folder.absolute()), Tag.COMMAND: command})
    return start


def _resumed(
    tracker: Tracker, start: Start, plan: Plan, study: Mapping[str, Any], identity: Mapping[str, Any]
) -> Iterator[str]:
    """What whoever resumes should know: what is done, and what has changed."""
    ledger, parent = start.ledger, start.parent
    done, total = _done(plan, ledger), len(plan.cells)
    yield f"resuming the study {plan.study.name} ({parent}): {done} of {total} cells are done"
    if ledger.closed:
        yield f"  {len(ledger.closed)} runs were open without a worker; they are now KILLED"
    for line in changes(tracker, parent, STUDY_FILE, study):
        yield f"  the configuration has changed: {line}"
    if ledger.cells and not any(name.startswith("identity/") for run in ledger.cells for name in run.params):
        yield "  its cells do not say what their names stood for, as those of version 0.1.0: they run again"
    for line in changes(tracker, parent, _IDENTITY_FILE, identity):
        yield f"  behind its name has changed: {line}; the cells that use it run again"


def _unfinished(tracker: Tracker, key: str) -> str | None:
    """The newest study of the same plan in this experiment, where it has not come to its end.

    Raises:
        UserError: somebody drives a study of this plan.
    """
    runs = _of_plan(tracker, key)
    for run in runs:
        if (alive := living_driver(tracker, run)) is not None:
            raise _running_already(run, alive)
    return runs[-1].run_id if runs and runs[-1].tags.get(Tag.COMPLETE) != "true" else None


def _take_over(tracker: Tracker, parent: str) -> tuple[Ledger, str]:
    """What the runs of a study say that nobody drives any more, and its folder, where it has one.

    Raises:
        UserError: no such run, not a study, or one whose driver (or worker) is still alive.
    """
    run = tracker.run(parent)
    if run.kind != Kind.STUDY:
        raise UserError(f"resume: the run {parent} is no study; give the id of a study's parent run.")
    if (alive := living_driver(tracker, run)) is not None:
        raise UserError(f"resume: the study {parent} is still running ({alive}); stop it first.")
    return read_ledger(tracker, parent), run.folder


def _of_plan(tracker: Tracker, key: str) -> list[Run]:
    return tracker.search(f"tags.{Tag.KIND} = '{Kind.STUDY}' and tags.{Tag.PLAN_KEY} = '{key}'")


def _running_already(run: Run, alive: str) -> UserError:
    return UserError(
        f"the study {run.name} is being run already ({alive}; run {run.run_id}): wait for its end, or start "
        "another one with resume=new."
    )


def _check_alone(tracker: Tracker, parent: str, mine: str, key: str | None) -> None:
    """Where no lock file is shared, two can have come at once: of two new studies with the plan's ``key`` the older
    one goes on, of two that resume a study the later one.

    Raises:
        UserError: it is the other's.
    """
    if not tracker.uri.startswith("sqlite:"):
        time.sleep(_SETTLING)
    run = tracker.run(parent)
    if run.driver != mine:
        raise UserError(f"the study {parent} was taken over in this moment ({living_driver(tracker, run)}).")
    if key is None:
        return
    for other in _of_plan(tracker, key):
        older = (other.start_time, other.run_id) < (run.start_time, parent)
        if older and (alive := living_driver(tracker, other)) is not None:
            tracker.finish(parent, "KILLED")
            if not tracker.adopted:
                tracker.delete(parent)
            raise _running_already(other, alive)


def _done(plan: Plan, ledger: Ledger) -> int:
    """How many cells of the plan have a FINISHED run. Their keys are not known before the masks are: told apart by
    their parameters, and by what those stood for."""

    def parameters(values: Mapping[str, str]) -> frozenset:
        return frozenset(pair for pair in values.items() if pair[0].startswith(("cfg/", "identity/")))

    finished = {parameters(run.params) for run in ledger.cells if run.is_finished}
    return sum(
        parameters(flatten_config(cell.config.canonical()) | flatten_config(dict(cell.identity), "identity"))
        in finished
        for cell in plan.cells
    )


def changes(tracker: Tracker, parent: str, file: str, now: Mapping[str, Any]) -> list[str]:
    """What differs between what a study was started with, in ``file`` among its artifacts, and ``now``, a line each."""
    try:
        before = load_yaml(tracker.fetch_text(parent, file))
    except UserError:  # killed before it was written
        return []
    old, new = dict(_leaves(before)), dict(_leaves(now))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            lines.append(f"{name} is gone (it was {old[name]})")
        elif name not in old:
            lines.append(f"{name} is new: {new[name]}")
        elif old[name] != new[name]:
            lines.append(f"{name}: {old[name]} -> {new[name]}")
    return lines


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
