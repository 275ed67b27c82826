"""Where jobs run: in the driver's process, in worker processes, on a Ray cluster, or as jobs of SLURM."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from sparse_ft.errors import UserError
from sparse_ft.models.devices import missing_gpus
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.executors import EXECUTORS, PROCESS, SERIAL
from sparse_ft.study.executors.process import default_workers
from sparse_ft.study.plan import Plan
from sparse_ft.study.queue import Listener, RunningExecutor
from sparse_ft.study.worker import WorkerSetup

__all__ = ["executor_problems", "make_executor", "runs_elsewhere", "worker_count"]


def make_executor(
    config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path
) -> RunningExecutor:
    """The executor that a configuration asks for, of a row of `sparse_ft.settings.executors.EXECUTORS`.

    Raises:
        UserError: what it needs is not installed, or its cluster does not answer.
    """
    return _module(config).start(config, setup, listen, workers, logs)


def runs_elsewhere(config: SweepConfig) -> bool:
    """Whether workers may be on other machines than this one."""
    return EXECUTORS[config.executor].elsewhere or config.ray_address is not None


def _module(config: SweepConfig) -> ModuleType:
    return import_module(f"sparse_ft.study.executors.{EXECUTORS[config.executor].name}")


def executor_problems(config: SweepConfig, plan: Plan) -> list[str]:
    """What an executor cannot run, one line each; empty where it can start."""
    problems = []
    if config.executor in (SERIAL.name, PROCESS.name):  # where the driver sees the workers' GPUs
        sizes = {(cell.device, cell.gpus_per_cell): None for cell in plan.configs if cell.gpus_per_cell > 1}
        problems = [problem for size in sizes if (problem := missing_gpus(*size))]
    if not EXECUTORS[config.executor].several:
        return problems
    problems += getattr(_module(config), "problems", lambda config: [])(config)
    named = dict.fromkeys(cell.device for cell in plan.configs if re.fullmatch(r"cuda:0*[1-9]\d*", cell.device))
    return problems + [
        f"device is {device}, but a worker of executor {config.executor} sees its own GPUs alone, from cuda:0 on; "
        "leave device at auto, and name the GPUs to use in CUDA_VISIBLE_DEVICES"
        for device in named
    ]


def worker_count(config: SweepConfig, gpus_per_cell: int = 1) -> int:
    """How many workers a configuration asks for.

    Raises:
        UserError: fewer than one.
    """
    if not EXECUTORS[config.executor].several:
        return 1
    if config.max_workers is None:
        return default_workers(gpus_per_cell)
    if config.max_workers < 1:
        raise UserError(f"max_workers is {config.max_workers}; it must be at least 1.")
    return config.max_workers
