"""Paths as people and schedulers write them (``~``, ``$SCRATCH``, ``a/../b``), read in one place and in one way."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from sparse_ft.errors import UserError

__all__ = ["normal_path"]

_URI = re.compile(r"[a-z][a-z0-9+.-]*:/")  # models:/, runs:/
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_HERE = "." + os.sep


def normal_path(name: str, value: str, words: Collection[str] = ()) -> str:
    """The value of a path parameter without ``~``, variables, doubled or trailing slashes, ``.`` and ``..``.

    ``words`` that have a meaning of their own, URIs and hub ids stay as they are.
    ``./none`` and ``./tiny-llama`` keep their ``./``: it is what makes them paths.

    Raises:
        UserError: an empty path, one with a character that no path has, a user or a variable that there is not.
    """
    if value in words or _URI.match(value):
        return value
    if not value.strip():
        raise UserError(f"{name} is empty; give a path.")
    if "\0" in value:
        raise UserError(f"{name} is {value!r}; no path has a NUL character.")
    path = os.path.expandvars(os.path.expanduser(value))
    if not os.path.lexists(path):
        if path.startswith("~"):
            raise UserError(f"{name} is '{value}'; there is no user {path.split(os.sep)[0][1:]} with a home folder.")
        if missing := _VARIABLE.search(path):
            raise UserError(f"{name} is '{value}'; the variable {missing[1].strip('{}')} is not set.")
    plain = os.path.normpath(path)
    if name in ("model", "teacher"):  # what no slash or dot begins may be a hub id
        keeps = path.startswith(_HERE) and not plain.startswith((os.sep, os.pardir))
        return _HERE + plain if keeps and plain != os.curdir else plain
    return _HERE + plain if plain in words else plain
