"""Checks made one after another. What has passed on the same files with the same code need not be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sparse_ft
from sparse_ft.cache import cache_dir
from sparse_ft.errors import UserError
from sparse_ft.files import write_text

__all__ = ["Checks"]

_LIBRARIES = ("transformers", "tokenizers", "lm_eval", "datasets", "trl")
_CODE = Path(sparse_ft.__file__).parent

Stamp = list[tuple[str, int, int]]


class Checks:
    """Makes checks, and keeps what they say.

    Args:
        repeat: make those too that have passed before; else they are not made, and what they need is not imported.

    Attributes:
        problems: one line each, in their order, each once.
    """

    def __init__(self, repeat: bool = True):
        self.problems: dict[str, None] = {}
        self._repeat = repeat
        self._stamps: dict[Path, Stamp] = {}

    def __call__(self, check: Callable[..., Any], *arguments: Any) -> None:
        """Makes a check; a UserError is a problem."""
        try:
            check(*arguments)
        except UserError as error:
            self.problems[str(error)] = None

    def once(self, about: Iterable[Any], places: Iterable[str | Path], check: Callable[..., Any], *args: Any) -> None:
        """Makes a check, and records in the project's cache that it has passed.

        Args:
            about: what is checked, and the values that it depends on: JSON, but for what str() tells apart.
            places: files and folders that it reads, beside those of the hub and of this program.
            check: see `__call__`.
        """
        marker = self._marker(about, places)
        if marker is not None and marker.is_file() and not self._repeat:
            return
        before = len(self.problems)
        self(check, *args)
        if marker is not None and len(self.problems) == before:
            with suppress(OSError):
                write_text(marker, "")

    def _marker(self, about: Iterable[Any], places: Iterable[str | Path]) -> Path | None:
        """The file that says so; None where there is no cache."""
        try:
            stamps = [self._stamp(Path(place).expanduser()) for place in (_CODE, *places)]
            said = json.dumps([*about, [version(name) for name in _LIBRARIES], stamps], default=str)
            return cache_dir() / "checks" / hashlib.sha256(said.encode()).hexdigest()[:32]
        except (OSError, UserError):
            return None

    def _stamp(self, place: Path) -> Stamp:
        """Name, size and time of a file, or of every file of a folder."""
        if place not in self._stamps:
            files = sorted(place.rglob("*.py" if place == _CODE else "*")) if place.is_dir() else [place]
            states = ((str(file), file.stat()) for file in files if file.is_file())
            self._stamps[place] = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
        return self._stamps[place]
