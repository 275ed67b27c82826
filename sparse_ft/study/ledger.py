"""Going on with a study that was stopped: what its runs say is done, what is to be run again, what has changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_ft.cell.failures import RETRIED, parse_retry
from sparse_ft.cell.identity import plan_identity
from sparse_ft.errors import UserError, masked
from sparse_ft.files import load_yaml
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.holder import driver_name, is_alive, is_here, living_driver
from sparse_ft.study.plan import Plan, Study
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.stores import store_lock

__all__ = [
    "IDENTITY_FILE",
    "STUDY_FILE",
    "Ledger",
    "changes",
    "describe",
    "find_unfinished",
    "plan_key",
    "take_over",
]

_SETTLING = 1.0  # seconds in which whoever starts at the same moment is seen on a server
_EXIT_SECONDS = 30  # seconds that workers have to end after their driver
STUDY_FILE, IDENTITY_FILE = "study.yaml", "identity.yaml"

Run = dict[str, Any]


@dataclass
class Ledger:
    """What the runs under a parent say.

    Attributes:
        finished: cell key -> its FINISHED run.
        failed: cell key -> its FAILED runs, oldest first, where none is FINISHED.
        masks: mask key -> its FINISHED run.
        asked: failure classes that whoever resumes wants tried again, whatever they are.
        closed: runs that nobody worked at any more and that were set KILLED.
        cells: every run of a cell that has ended.
    """

    finished: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, list[Run]] = field(default_factory=dict)
    masks: dict[str, Run] = field(default_factory=dict)
    closed: list[Run] = field(default_factory=list)
    asked: frozenset[str] = frozenset()
    cells: list[Run] = field(default_factory=list)

    def has(self, key: str, params: Mapping[str, str]) -> bool:
        """Whether a cell of this key has a FINISHED run under these very names."""
        done = [run for run in self.cells if run["status"] == "FINISHED" and run["tags"].get("cell_key") == key]
        return any(params.items() <= run["params"].items() for run in done)

    def hopeless(self, key: str) -> Run | None:
        """The failed run after which the cell is not tried again; None where it is."""
        runs = self.failed.get(key)
        return runs[-1] if runs and self.failure_class(key) not in RETRIED | self.asked else None

    def failure_class(self, key: str) -> str | None:
        """The class in which the latest try of the cell failed."""
        runs = self.failed.get(key)
        return runs[-1]["tags"].get("failure_class") if runs else None

    def ran_out_of_memory(self, key: str) -> bool:
        """Whether the latest try of the cell ended for want of memory, with the batch the plan asks for."""
        tags = self.failed[key][-1]["tags"] if self.failed.get(key) else {}
        return tags.get("failure_class") == "out_of_memory" and "reduced_batch" not in tags


@dataclass(frozen=True)
class Start:
    """The study's run, its folder, what was done under it before, and this start's name in the store."""

    parent: str
    folder: Path
    ledger: Ledger
    driver: str = ""


def start_study(
    tracker: Tracker, plan: Plan, config: SweepConfig, console: Console, identities: Sequence[Mapping[str, str]]
) -> Start:
    """A new study's run, or that of the one to resume; from here on it is this driver's alone.

    Args:
        identities: of each cell, what its names stand for; see `sparse_ft.cell.identity.cell_identity`.

    Raises:
        UserError: somebody drives the same study, or the one to resume; a failure class that does not exist.
    """
    identity = plan_identity(plan.cells, identities)
    name, mine, asked = plan.study.name, driver_name(), parse_retry(config.retry) | plan.study.retry
    claim = {"plan_key": plan_key(plan), "driver": mine, "heartbeat": time.time(), "complete": False}
    with store_lock(tracker.uri):  # two that start at once: the second one finds the first
        found = find_unfinished(tracker, plan) if config.resume is None else None
        parent = found if config.resume in (None, "new") else config.resume
        if new := parent is None:
            parent, ledger = tracker.start(name, {"kind": "study", **claim}), Ledger()
        else:
            ledger = take_over(tracker, parent)
            run = tracker.run(parent)
            tracker.log(parent, tags=claim)
            tracker.reopen(parent)
    _alone(tracker, parent, mine, claim["plan_key"] if new and config.resume is None else None)
    ledger.asked = asked
    if new:
        folder = Path(config.output_dir) / f"{name}-{parent[:8]}"
        tracker.log(parent, params={"cfg/study": name, "cfg/cells": len(plan.cells)})
        text = Path(config.config).read_text(encoding="utf-8", errors="replace")
        tracker.log_text(parent, text, Path(config.config).name)  # as it was written, but for passwords
    else:
        folder = Path(run["tags"].get("folder") or Path(config.output_dir) / f"{name}-{parent[:8]}")
        done = _done(plan, identities, ledger)
        said = f"resuming the study {name} ({parent}): {done} of {len(plan.cells)} cells are done"
        console.print(said, soft_wrap=True)
        if ledger.closed:
            console.print(f"  {len(ledger.closed)} runs were open that nobody worked at; they are now KILLED")
        for line in changes(tracker, parent, STUDY_FILE, describe(plan.study)):
            console.print(f"  the configuration has changed: {line}", highlight=False, soft_wrap=True)
        if ledger.cells and not any(name.startswith("identity/") for run in ledger.cells for name in run["params"]):
            said = "  its cells do not say what their names stood for, as those of version 0.1.0: they run again"
            console.print(said, highlight=False, soft_wrap=True)
        for line in changes(tracker, parent, IDENTITY_FILE, identity):
            said = f"  behind its name has changed: {line}; the cells that use it run again"
            console.print(said, highlight=False, soft_wrap=True)
        if adopted := os.environ.get("MLFLOW_RUN_ID"):  # the run that `mlflow run` made for this start
            tracker.log(adopted, tags={"kind": "resume", "resumes": parent})
    tracker.log_dict(parent, describe(plan.study), STUDY_FILE)
    tracker.log_dict(parent, identity, IDENTITY_FILE)
    tracker.log(parent, tags={"folder": str(folder.absolute())})
    return Start(parent, folder, ledger, mine)


def _alone(tracker: Tracker, parent: str, mine: str, key: str | None) -> None:
    """Where no lock file is shared, two can have come at once: of two new studies with the plan's ``key`` the older
    one goes on, of two that resume a study the later one.

    Raises:
        UserError: it is the other's.
    """
    if not tracker.uri.startswith("sqlite:"):
        time.sleep(_SETTLING)
    run = tracker.run(parent)
    if run["tags"].get("driver") != mine:
        raise UserError(f"the study {parent} was taken over in this moment ({living_driver(tracker, run)}).")
    if key is None:
        return
    for other in _of_plan(tracker, key):
        older = (other["start_time"], other["run_id"]) < (run["start_time"], parent)
        if older and (alive := living_driver(tracker, other)) is not None:
            tracker.finish(parent, "KILLED")
            if not os.environ.get("MLFLOW_RUN_ID"):
                tracker.delete(parent)
            raise _running_already(other, alive)


def _done(plan: Plan, identities: Sequence[Mapping[str, str]], ledger: Ledger) -> int:
    """How many cells of the plan have a FINISHED run. Their keys are not known before the masks are: told apart by
    their parameters, and by what those stood for."""

    def parameters(values: Mapping[str, str]) -> frozenset:
        return frozenset(pair for pair in values.items() if pair[0].startswith(("cfg/", "identity/")))

    finished = {parameters(run["params"]) for run in ledger.cells if run["status"] == "FINISHED"}
    return sum(
        parameters(flatten_config(cell.canonical()) | flatten_config(dict(identity), "identity")) in finished
        for cell, identity in zip(plan.cells, identities, strict=True)
    )


def plan_key(plan: Plan) -> str:
    """Identity of a plan: SHA-256 (16 hex digits) over its cells, so that the same study is known again."""
    search = masked(json.dumps(plan.study.search, sort_keys=True))  # a changed password is no other study
    text = json.dumps([plan.study.name, search, sorted(cell.key() for cell in plan.cells)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(study: Study) -> dict[str, Any]:
    """The study as plain data, for its run's ``study.yaml``, which `changes` reads."""
    values = {"name": study.name, "grid": dict(study.grid), "cell": dict(study.cell), "keep": study.kept}
    values |= {"dense_baseline": study.dense_baseline, "register": study.register, "search": study.search}
    if study.trainer != "local":  # what older versions' files do not say
        values["trainer"] = study.trainer
    return json.loads(json.dumps(values), object_hook=_masked)


def _masked(values: dict[str, Any]) -> dict[str, Any]:
    return {name: masked(value) if isinstance(value, str) else value for name, value in values.items()}


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


def find_unfinished(tracker: Tracker, plan: Plan) -> str | None:
    """The newest study of the same plan in this experiment, where it has not come to its end.

    Raises:
        UserError: somebody drives a study of this plan.
    """
    runs = _of_plan(tracker, plan_key(plan))
    for run in runs:
        if (alive := living_driver(tracker, run)) is not None:
            raise _running_already(run, alive)
    if not runs or runs[-1]["tags"].get("complete") == "true":
        return None
    return runs[-1]["run_id"]


def _of_plan(tracker: Tracker, key: str) -> list[Run]:
    return tracker.search(f"tags.kind = 'study' and tags.plan_key = '{key}'")


def _running_already(run: Run, alive: str) -> UserError:
    return UserError(
        f"the study {run['name']} is being run already ({alive}; run {run['run_id']}): wait for its end, or start "
        "another one with resume=new."
    )


def take_over(tracker: Tracker, parent: str) -> Ledger:
    """Reads the runs of a study, and sets those KILLED that nobody works at any more.

    Raises:
        UserError: no such run, not a study, or one whose driver (or worker) is still alive.
    """
    run = tracker.run(parent)
    if run["tags"].get("kind") != "study":
        raise UserError(f"resume: the run {parent} is no study; give the id of a study's parent run.")
    if (alive := living_driver(tracker, run)) is not None:
        raise UserError(f"resume: the study {parent} is still running ({alive}); stop it first.")
    ledger = Ledger()
    failed: dict[str, list[Run]] = defaultdict(list)
    for child in tracker.children(parent):
        tags, status = child["tags"], child["status"]
        if "superseded" in tags:
            continue
        if status not in ("FINISHED", "FAILED", "KILLED"):
            _wait_for_end(tags.get("worker", ""))
            child = tracker.run(child["run_id"])  # it may have come to its end in this moment
            status = child["status"]
        if status not in ("FINISHED", "FAILED", "KILLED"):
            tracker.log(child["run_id"], tags={"killed_because": "the study was stopped before the run had ended"})
            tracker.finish(child["run_id"], "KILLED")
            ledger.closed.append(child)
        elif status == "FINISHED" and tags.get("kind") == "cell":
            ledger.finished[tags["cell_key"]] = child
            ledger.cells.append(child)
        elif status == "FINISHED" and tags.get("kind") == "masks":
            ledger.masks[tags.get("mask_key", "")] = child
        elif status == "FAILED" and tags.get("kind") == "cell":
            failed[tags["cell_key"]].append(child)
            ledger.cells.append(child)
    ledger.failed = {key: runs for key, runs in failed.items() if key not in ledger.finished}
    return ledger


def _wait_for_end(worker: str) -> None:
    """Workers end with their driver; one of this host that still does is waited for."""
    if not is_here(worker):
        return
    give_up = time.monotonic() + _EXIT_SECONDS
    while is_alive(worker):
        if time.monotonic() > give_up:
            number = worker.split(" ")[1]
            raise UserError(f"resume: process {number} still works for this study; end it first (kill {number}).")
        time.sleep(0.1)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
