"""Where jobs run: in the driver's process, in worker processes, or on a Ray cluster."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.executors import EXECUTORS
from sparse_ft.study.executors.process import default_workers
from sparse_ft.study.plan import Plan
from sparse_ft.study.queue import Listener, RunningExecutor
from sparse_ft.study.worker import WorkerSetup

__all__ = ["executor_problems", "make_executor", "worker_count"]


def make_executor(
    config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path
) -> RunningExecutor:
    """The executor that a configuration asks for, of a row of `sparse_ft.settings.executors.EXECUTORS`.

    Raises:
        UserError: ray is asked for and not installed, or its cluster does not answer.
    """
    start = resolve_name(f"sparse_ft.study.executors.{EXECUTORS[config.executor].name}:start")
    return start(config, setup, listen, workers, logs)


def executor_problems(config: SweepConfig, plan: Plan) -> list[str]:
    """What an executor cannot run, one line each; empty where it can start."""
    if not EXECUTORS[config.executor].several:
        return []
    named = dict.fromkeys(cell.device for cell in plan.configs if re.fullmatch(r"cuda:0*[1-9]\d*", cell.device))
    return [
        f"device is {device}, but a worker of executor {config.executor} sees one GPU alone, and calls it cuda:0; "
        "leave device at auto, and name the GPUs to use in CUDA_VISIBLE_DEVICES"
        for device in named
    ]


def worker_count(config: SweepConfig) -> int:
    """How many workers a configuration asks for.

    Raises:
        UserError: fewer than one.
    """
    if not EXECUTORS[config.executor].several:
        return 1
    if config.max_workers is None:
        return default_workers()
    if config.max_workers < 1:
        raise UserError(f"max_workers is {config.max_workers}; it must be at least 1.")
    return config.max_workers
