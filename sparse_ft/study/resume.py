"""Going on with a study that was stopped: what its runs say is done, what is to be run again, what has changed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from sparse_ft.errors import UserError
from sparse_ft.study.config import SweepConfig
from sparse_ft.study.failures import RETRIED
from sparse_ft.study.identity import plan_identity
from sparse_ft.study.plan import Plan, Study
from sparse_ft.study.worker import process_name
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.runs import Tracker

__all__ = [
    "HEARTBEAT_SECONDS",
    "IDENTITY_FILE",
    "STUDY_FILE",
    "Ledger",
    "changes",
    "describe",
    "find_unfinished",
    "plan_key",
    "take_over",
]

HEARTBEAT_SECONDS = 30  # how often a driver says on its run that it lives
_PATIENCE = 30  # seconds that workers have to end after their driver
STUDY_FILE, IDENTITY_FILE = "study.yaml", "identity.yaml"

Run = dict[str, Any]


@dataclass
class Ledger:
    """What the runs under a parent say.

    Attributes:
        finished: cell key -> its FINISHED run.
        failed: cell key -> its FAILED runs, oldest first, where none is FINISHED.
        masks: mask key -> its FINISHED run.
        closed: runs that nobody worked at any more and that were set KILLED.
        cells: every run of a cell that has ended.
    """

    finished: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, list[Run]] = field(default_factory=dict)
    masks: dict[str, Run] = field(default_factory=dict)
    closed: list[Run] = field(default_factory=list)
    cells: list[Run] = field(default_factory=list)

    def has(self, key: str, params: Mapping[str, str]) -> bool:
        """Whether a cell of this key has a FINISHED run under these very names."""
        done = [run for run in self.cells if run["status"] == "FINISHED" and run["tags"].get("cell_key") == key]
        return any(params.items() <= run["params"].items() for run in done)

    def settled(self, key: str) -> bool:
        """Whether another try could not end differently: FINISHED, or failed in a class that is not tried again."""
        return key in self.finished or self.hopeless(key) is not None

    def hopeless(self, key: str) -> Run | None:
        """The failed run after which the cell is not tried again; None where it is."""
        runs = self.failed.get(key)
        return runs[-1] if runs and runs[-1]["tags"].get("failure_class") not in RETRIED else None

    def ran_out_of_memory(self, key: str) -> bool:
        """Whether the latest try of the cell ended for want of memory, with the batch the plan asks for."""
        tags = self.failed[key][-1]["tags"] if self.failed.get(key) else {}
        return tags.get("failure_class") == "out_of_memory" and "reduced_batch" not in tags


@dataclass(frozen=True)
class Start:
    """The study's run, its folder, and what was done under it before."""

    parent: str
    folder: Path
    ledger: Ledger


def start_study(
    tracker: Tracker, plan: Plan, config: SweepConfig, console: Console, identities: Sequence[Mapping[str, str]]
) -> Start:
    """A new study's run, or that of the one to go on with. ``identities``: of each cell, what its names stand for;
    see `sparse_ft.study.identity.cell_identity`."""
    identity = plan_identity(plan, identities)
    name = plan.study.name
    found = find_unfinished(tracker, plan) if config.resume == "none" else None
    parent = found if config.resume in ("none", "new") else config.resume
    if parent is None:
        parent = tracker.start(name, {"kind": "study", "driver": process_name(), "heartbeat": time.time()})
        folder = Path(config.output_dir) / f"{name}-{parent[:8]}"
        ledger = Ledger()
        tracker.log(parent, params={"cfg/study": name, "cfg/cells": len(plan.cells)})
        tracker.log_dict(parent, describe(plan.study), STUDY_FILE)
        tracker.log_file(parent, config.config)
    else:
        ledger = take_over(tracker, parent)
        run = tracker.run(parent)
        folder = Path(run["tags"].get("folder") or Path(config.output_dir) / f"{name}-{parent[:8]}")
        done = _done(plan, identities, ledger)
        said = f"going on with the study {name} ({parent}): {done} of {len(plan.cells)} cells are done"
        console.print(said, soft_wrap=True)
        if ledger.closed:
            console.print(f"  {len(ledger.closed)} runs were open that nobody worked at; they are now KILLED")
        for line in changes(tracker, parent, STUDY_FILE, describe(plan.study)):
            console.print(f"  the configuration has changed: {line}", highlight=False, soft_wrap=True)
        for line in changes(tracker, parent, IDENTITY_FILE, identity):
            said = f"  behind its name has changed: {line}; the cells that use it run again"
            console.print(said, highlight=False, soft_wrap=True)
        tracker.reopen(parent)
        if adopted := os.environ.get("MLFLOW_RUN_ID"):  # the run that `mlflow run` made for this start
            tracker.log(adopted, tags={"kind": "resume", "resumes": parent})
        tracker.log_dict(parent, describe(plan.study), STUDY_FILE)
    tracker.log_dict(parent, identity, IDENTITY_FILE)
    tags = {"plan_key": plan_key(plan), "driver": process_name(), "heartbeat": time.time(), "complete": False}
    tracker.log(parent, tags={**tags, "folder": str(folder.absolute())})
    return Start(parent, folder, ledger)


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
    text = json.dumps([plan.study.name, plan.study.search, sorted(cell.key() for cell in plan.cells)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(study: Study) -> dict[str, Any]:
    """The study as plain data, for its run's ``study.yaml``, which `changes` reads."""
    values = {"name": study.name, "grid": dict(study.grid), "cell": dict(study.cell), "keep": study.kept}
    values |= {"dense_baseline": study.dense_baseline, "register": study.register, "search": study.search}
    return json.loads(json.dumps(values))


def changes(tracker: Tracker, parent: str, file: str, now: Mapping[str, Any]) -> list[str]:
    """What differs between what a study was started with, in ``file`` among its artifacts, and ``now``, a line each."""
    try:
        before = yaml.safe_load(tracker.fetch_text(parent, file))
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
    """The newest study of the same plan in this experiment that has not come to its end and that nobody is at."""
    key = plan_key(plan)
    runs = tracker.search(f"tags.kind = 'study' and tags.plan_key = '{key}'")
    for run in reversed(runs):
        if run["tags"].get("complete") == "true":
            return None
        if _driver_alive(run) is None:
            return run["run_id"]
    return None


def take_over(tracker: Tracker, parent: str) -> Ledger:
    """Reads the runs of a study, and sets those KILLED that nobody works at any more.

    Raises:
        UserError: no such run, not a study, or one whose driver (or worker) is still alive.
    """
    run = tracker.run(parent)
    if run["tags"].get("kind") != "study":
        raise UserError(f"resume: the run {parent} is no study; give the id of a study's parent run.")
    if (alive := _driver_alive(run)) is not None:
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


def _driver_alive(run: Run) -> str | None:
    """Who drives a study now, in words; None: nobody."""
    if run["status"] != "RUNNING":
        return None
    name = run["tags"].get("driver", "")
    host = name.split(" ")[0]
    if host == platform.node():
        return f"process {name.split(' ')[1]}" if _alive(name) else None
    beat = float(run["tags"].get("heartbeat", 0))
    return f"on {host}" if time.time() - beat < 3 * HEARTBEAT_SECONDS else None


def _alive(name: str) -> bool:
    """Whether a process of this host lives; see `sparse_ft.study.worker.process_name`."""
    try:
        _, number, began = name.split(" ")
        process = psutil.Process(int(number))
        same = abs(process.create_time() - float(began)) < 1  # the number may have been given to another since
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.Error):
        return False


def _wait_for_end(worker: str) -> None:
    """Workers end with their driver; one of this host that still does is waited for."""
    if worker.split(" ")[0] != platform.node():
        return
    give_up = time.monotonic() + _PATIENCE
    while _alive(worker):
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
