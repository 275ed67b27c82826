"""The command line: ``sparse-ft NAME``, and ``python -m entrypoints.NAME`` for MLflow projects.

A command is a row of `COMMANDS`: its parameters, and the function that takes them. Neither --help nor a mistyped flag
imports what that function needs.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from sparse_ft import __version__
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import TrainConfig
from sparse_ft.settings.commands import (
    AnalyzeConfig,
    CerebrasConfigsConfig,
    MaskConfig,
    MeasureConfig,
    PackConfig,
    PushConfig,
    RebuildConfig,
    SweepConfig,
    UnpackConfig,
    ValidateConfig,
)
from sparse_ft.settings.parser import Parser

__all__ = ["COMMANDS", "Command", "main", "run"]

_SOFTWARE = 70  # EX_SOFTWARE of sysexits.h


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        parameters: dataclass whose fields are the flags; its docstring is the help.
        work: ``module:function`` from an instance of it to the exit status.
    """

    parameters: type
    work: str

    @property
    def summary(self) -> str:
        """The first line of the help."""
        return (self.parameters.__doc__ or "").splitlines()[0]

    def __call__(self, parameters: Any) -> int:
        return resolve_name(self.work)(parameters)


COMMANDS = {
    "compute_masks": Command(MaskConfig, "sparse_ft.commands.compute_masks:compute_masks"),
    "train": Command(TrainConfig, "sparse_ft.commands.train:train"),
    "validate": Command(ValidateConfig, "sparse_ft.commands.validate:validate"),
    "analyze": Command(AnalyzeConfig, "sparse_ft.commands.analyze:analyze"),
    "sweep": Command(SweepConfig, "sparse_ft.commands.sweep:sweep"),
    "rebuild": Command(RebuildConfig, "sparse_ft.commands.rebuild:rebuild"),
    "measure": Command(MeasureConfig, "sparse_ft.commands.measure:measure"),
    "pack": Command(PackConfig, "sparse_ft.commands.pack:pack"),
    "unpack": Command(UnpackConfig, "sparse_ft.commands.pack:unpack"),
    "push": Command(PushConfig, "sparse_ft.commands.push:push"),
    "cerebras_configs": Command(CerebrasConfigsConfig, "sparse_ft.commands.cerebras_configs:cerebras_configs"),
}


def main() -> int:
    """``sparse-ft`` with the arguments of this process; returns its exit status."""
    first, *rest = sys.argv[1:] or ["--help"]
    name = first.replace("-", "_")
    if name in COMMANDS:
        return run(name, rest, f"sparse-ft {name}")
    if first in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: sparse-ft COMMAND ...\n\nsparse-ft COMMAND --help lists the parameters of a command.\n")
        print("\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()))
        return 0
    if first == "--version":
        print(f"sparse_ft {__version__}")
        return 0
    print(f"sparse-ft: there is no command {first!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2


def run(name: str, argv: Sequence[str], program: str) -> int:
    """Parses the arguments of a command, does its work, and returns the exit status.

    Wrong input ends with one line on stderr and exit status 2; Ctrl-C with 130. Anything unexpected ends with
    its traceback and 70, and not with Python's own 1, which is an answer: that of a checkpoint that violates its
    masks, or of a study with cells that failed.

    Args:
        name: a key of `COMMANDS`.
        argv: what follows the name.
        program: what the usage line of --help shows.
    """
    # What libraries deprecate among themselves is no news for whoever runs a study.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal does not have costs no result
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = COMMANDS[name]
    try:
        return command(Parser(command.parameters, program).arguments(argv))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        return _failed(name, error)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def _failed(name: str, error: Exception) -> int:
    from sparse_ft.cell.failures import ValidationFailedError  # late: --help comes without torch

    if isinstance(error, ValidationFailedError):  # of a cell's own model: the answer that 1 stands for
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    return _SOFTWARE
