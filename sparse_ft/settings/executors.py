"""The executors that a study's cells run in: one row each. The code is the module of that name in study/executors/."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXECUTORS", "Executor", "executors_help"]


@dataclass(frozen=True)
class Executor:
    """One place where cells run.

    Attributes:
        name: as flags and files spell it; the function ``start`` of ``sparse_ft.study.executors.NAME``
            makes it.
        where: ends "cells run ...", for --help.
        several: whether it has several workers, each in a process that sees its own GPUs alone.
        elsewhere: whether these are on other machines than the driver's.
    """

    name: str
    where: str
    several: bool
    elsewhere: bool = False


SERIAL = Executor("serial", "one after another here", several=False)
PROCESS = Executor("process", "in worker processes on this machine", several=True)
RAY = Executor("ray", "on a Ray cluster", several=True)
SUBMITIT = Executor("submitit", "as jobs of a SLURM cluster", several=True, elsewhere=True)
EXECUTORS = {executor.name: executor for executor in (SERIAL, PROCESS, RAY, SUBMITIT)}


def executors_help() -> str:
    """What there is to choose from, in one sentence."""
    *most, last = (f"{executor.where} ({executor.name})" for executor in EXECUTORS.values())
    return f"where cells run: {', '.join(most)}, or {last}."
