"""Where jobs run: in the driver's process, in worker processes, on a Ray cluster, or trained on a Cerebras."""

from __future__ import annotations

import re
from pathlib import Path

from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.executors.process import ProcessExecutor, default_workers
from sparse_ft.study.executors.serial import SerialExecutor
from sparse_ft.study.plan import Plan
from sparse_ft.study.queue import Listener
from sparse_ft.study.worker import WorkerSetup

__all__ = ["executor_problems", "make_executor", "worker_count"]


def make_executor(
    config: SweepConfig, setup: WorkerSetup, listen: Listener, workers: int, logs: Path
) -> SerialExecutor | ProcessExecutor:
    """The executor that a configuration asks for.

    Raises:
        UserError: ray is asked for and not installed, or its cluster does not answer; Cerebras settings that cannot
            be read.
    """
    limit = None if config.cell_seconds == "none" else float(config.cell_seconds)
    if config.executor == "process":
        return ProcessExecutor(setup, listen, workers, limit, logs=logs)
    if config.executor == "ray":
        from sparse_ft.study.executors.ray import RayExecutor

        return RayExecutor(setup, listen, workers, limit, address=config.ray_address)
    if config.executor == "cerebras":
        from sparse_ft.cerebras.trainer import load_settings
        from sparse_ft.study.executors.cerebras import CerebrasExecutor, CerebrasSetup

        trained = CerebrasSetup(**vars(setup), cerebras=load_settings(config.cerebras))
        return CerebrasExecutor(trained, listen, limit)
    return SerialExecutor(setup, listen, limit)


def executor_problems(config: SweepConfig, plan: Plan, bench: Workbench) -> list[str]:
    """What an executor's surroundings lack and what it cannot run, one line each; empty where it can start.

    Raises:
        UserError: Cerebras settings that cannot be read.
    """
    if config.executor in ("process", "ray"):
        named = dict.fromkeys(cell.device for cell in plan.cells if re.fullmatch(r"cuda:0*[1-9]\d*", cell.device))
        return [
            f"device is {device}, but a worker of executor {config.executor} sees one GPU alone, and calls it cuda:0; "
            "leave device at auto, and name the GPUs to use in CUDA_VISIBLE_DEVICES"
            for device in named
        ]
    if config.executor != "cerebras":
        return []
    from sparse_ft.cerebras.preflight import preflight
    from sparse_ft.cerebras.trainer import check_trainable, load_settings

    settings = load_settings(config.cerebras)
    problems = dict.fromkeys(preflight(settings.python, settings.device))
    for cell in plan.cells:
        try:
            model = bench.checkpoint(cell.model).config
        except UserError:
            continue  # said already: every executor needs it
        try:
            check_trainable(cell, model, settings)
        except UserError as error:
            problems[f"{cell.model} cannot be trained on a Cerebras: {error}"] = None
    return list(problems)


def worker_count(config: SweepConfig) -> int:
    """How many workers a configuration asks for.

    Raises:
        UserError: fewer than one.
    """
    if config.executor in ("serial", "cerebras"):
        return 1
    if config.max_workers == "none":
        return default_workers()
    if config.max_workers < 1:
        raise UserError(f"max_workers is {config.max_workers}; it must be at least 1.")
    return config.max_workers
