"""Settings as the command that a person would type for them."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_ft.settings.field import is_flag, plain

__all__ = ["command_line"]


def command_line(name: str, settings: Any, leave_out: tuple[str, ...] = ()) -> str | None:
    """``sparse-ft NAME --flag=value ...``, which reads back as these settings: every flag that is not at its default.

    Paths of things that are here are absolute, so that the command does the same in every folder.

    Args:
        name: of the command; its parameters have all fields of ``settings``.
        settings: what it is to be given.
        leave_out: fields that it is not given.

    Returns:
        None where no command can say it: a value that is a function.
    """
    words = ["sparse-ft", name]
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if callable(value):
            return None
        empty = value == "" or value == ()  # of a mask set in a study: no folder, or no task of its own
        if entry.name in leave_out or not is_flag(entry) or value == entry.default or empty:
            continue
        text = plain(entry, value)
        text = str(text).lower() if isinstance(text, bool) else str(text)
        if entry.metadata["path"] is not None and text not in entry.metadata["path"] and Path(text).exists():
            text = str(Path(text).absolute())
        words.append(shlex.quote(f"--{entry.name}={text}"))
    return " ".join(words)
