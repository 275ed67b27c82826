"""What every entry point shares: parse, call, exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

from sparse_ft.errors import UserError
from sparse_ft.settings.parser import Parser

__all__ = ["command"]

T = TypeVar("T")
_SOFTWARE = 70  # EX_SOFTWARE of sysexits.h


def command(name: str, kind: type[T], work: Callable[[T], int]) -> None:
    """Parses the command line into ``kind``, does the work, and ends the process with its exit status.

    Wrong input ends with one line on stderr and exit status 2; Ctrl-C with 130. Anything unexpected ends with
    its traceback and 70, and not with Python's own 1, which is an answer: that of a checkpoint that violates its
    masks, or of a study with cells that failed.
    """
    # What libraries deprecate among themselves is no news for whoever runs a study.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal does not have costs no result
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = work(Parser(kind, f"python -m entrypoints.{name}").arguments(sys.argv[1:]))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except Exception as error:
        status = _failed(name, error)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        status = 130
    sys.exit(status)


def _failed(name: str, error: Exception) -> int:
    from sparse_ft.cell.failures import ValidationFailedError  # late: --help comes without torch

    if isinstance(error, ValidationFailedError):  # of a cell's own model: the answer that 1 stands for
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    return _SOFTWARE
