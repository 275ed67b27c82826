"""Objects from one process to another through a file that only grows: on machines that share no more than a folder."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Mailbox"]

_LENGTH = struct.Struct(">Q")


class Mailbox:
    """One end of a file that one process writes and another one reads.

    The file is opened anew for every look: a network's file system then asks its server, and not what it remembers.

    Args:
        path: made by `create`, before either end looks.
    """

    def __init__(self, path: Path):
        self._path, self._read = path, 0

    def create(self) -> Mailbox:
        """Makes the file, empty, with its folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        return self

    def put(self, items: Iterable[Any]) -> None:
        """Adds objects that can be pickled: all of them, or none where it raises OSError."""
        bodies = [pickle.dumps(item) for item in items]
        data = memoryview(b"".join(_LENGTH.pack(len(body)) + body for body in bodies))
        with open(self._path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while data:  # what a full disk takes of it is less than all
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise

    def take(self) -> Iterator[Any]:
        """What has come since the last look; the rest of one that has come in part comes later."""
        with open(self._path, "rb") as file:
            file.seek(self._read)
            data = file.read()
        while len(data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
            if len(data) < end:
                return
            body, data = data[_LENGTH.size : end], data[end:]
            self._read += end
            yield pickle.loads(body)
