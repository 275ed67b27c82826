"""A Hugging Face checkpoint folder, read tensor by tensor without building the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder
from sparse_ft.models.names import prunable_names
from sparse_ft.progress import SILENT, Progress

__all__ = ["Checkpoint", "Entry", "copy_checkpoint", "open_checkpoint"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file, and the bytes there."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class Checkpoint:
    """A folder with ``config.json`` and ``*.safetensors``, one file or shards.

    Nothing but the files' headers is read on opening; tensors are memory-mapped.

    Raises:
        UserError: no such folder, no config, no safetensors, a missing or truncated shard.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"Checkpoint {folder}: there is no such folder.")
        self._entries: dict[str, Entry] = {}
        for file in self._files():
            self._entries.update(_read_entries(file))
        missing = sorted(set(self._index()) - set(self._entries))
        if missing:
            raise UserError(f"Checkpoint {folder}: its index names {missing[0]}, which no file holds.")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"Checkpoint {self.folder} has no config.json.") from None
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None

    @property
    def names(self) -> list[str]:
        """All tensor names, in name order."""
        return sorted(self._entries)

    @cached_property
    def prunable(self) -> list[str]:
        """Names of the prunable tensors, in name order."""
        return prunable_names(self.config, self._entries.keys())

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold at least one tensor, in name order."""
        return sorted({entry.file for entry in self._entries.values()})

    def shard(self, name: str) -> Path:
        """The file that holds the tensor ``name``."""
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.begin

    def offset(self, name: str) -> int:
        """Position of the tensor's first byte in its file."""
        return self._entry(name).begin

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, ``uint8 [nbytes]``, memory-mapped and read-only."""
        entry = self._entry(name)
        if entry.end == entry.begin:
            return np.empty(0, np.uint8)
        return np.memmap(entry.file, np.uint8, "r", entry.begin, (entry.end - entry.begin,))

    @contextmanager
    def reading(self, name: str) -> Iterator[Callable[[np.ndarray, int], None]]:
        """Yields ``read(buffer, begin)``: fills an array with the tensor's bytes from ``begin`` on.

        Raises:
            UserError: while reading, a file that ends within the tensor.
        """
        entry = self._entry(name)
        with open(entry.file, "rb", buffering=0) as file:

            def read(buffer: np.ndarray, begin: int) -> None:
                view, offset = memoryview(buffer).cast("B"), entry.begin + begin
                while view:
                    count = os.preadv(file.fileno(), [view], offset)
                    if count == 0:
                        raise UserError(f"The file of {name} ends within the tensor; it is truncated.")
                    view, offset = view[count:], offset + count

            yield read

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        entry = self._entry(name)
        return torch.from_numpy(np.array(self.raw(name))).view(entry.dtype).reshape(entry.shape)

    def prunable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every prunable tensor, by name."""
        return {name: self.shape(name) for name in self.prunable}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell these weights from any others.

        SHA-256 over every tensor's name, dtype, shape and bytes, in name order: one changed bit anywhere changes it,
        and how the tensors are spread over files does not. Reads the whole checkpoint once, on all cores.
        """

        def digest(name: str) -> bytes:
            return hashlib.sha256(self.raw(name)).digest()

        identity = hashlib.sha256()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter to others
            for name, content in zip(self.names, pool.map(digest, self.names), strict=True):
                entry = self._entry(name)
                identity.update(f"{name} {entry.dtype} {entry.shape}\n".encode() + content)
        return identity.hexdigest()[:16]

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise UserError(f"Checkpoint {self.folder} has no tensor {name}.") from None

    def _index(self) -> dict[str, str]:
        path = self.folder / "model.safetensors.index.json"
        return json.loads(path.read_text(encoding="utf-8"))["weight_map"] if path.is_file() else {}

    def _files(self) -> list[Path]:
        listed = sorted({self.folder / file for file in self._index().values()})
        files = listed or sorted(self.folder.glob("model*.safetensors"))
        if not files:
            raise UserError(
                f"Checkpoint {self.folder} has no model*.safetensors. Pickled .bin weights are not read: convert"
                " them with transformers' save_pretrained."
            )
        for file in files:
            if not file.is_file():
                raise UserError(f"Checkpoint {self.folder}: the shard {file.name} is missing.")
        return files


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a Hugging Face folder, or a Cerebras ``.mdl`` file seen as one.

    Raises:
        UserError: neither.
    """
    if Path(path).suffix == ".mdl":
        from sparse_ft.models.cerebras import CerebrasCheckpoint

        return CerebrasCheckpoint(path)
    return Checkpoint(path)


def copy_checkpoint(
    source: Checkpoint,
    target: str | Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    progress: Progress = SILENT,
) -> Path:
    """Writes a copy of a checkpoint with ``change(name, tensor)`` applied to every tensor.

    Goes file by file, so memory holds one shard. Config, tokenizer and index are copied; the folder appears
    when it is complete. Names, shapes and dtypes must stay.

    Raises:
        ValueError: ``change`` returned another shape or dtype.
    """
    progress.start("write checkpoint", sum(source.nbytes(name) for name in source.names), "B")
    with atomic_folder(target) as folder:
        for other in source.folder.iterdir():
            if other.is_file() and other.suffix not in (".safetensors", ".bin", ".pt", ".gguf"):
                shutil.copy2(other, folder / other.name)
        for file in source.files:
            tensors = {}
            for name in (name for name in source.names if source.shard(name) == file):
                tensor = source.tensor(name)
                changed = change(name, tensor)
                if changed.shape != tensor.shape or changed.dtype != tensor.dtype:
                    raise ValueError(f"{name}: {changed.dtype} {tuple(changed.shape)} instead of {tensor.dtype}")
                tensors[name] = changed.contiguous()
                progress.advance(source.nbytes(name))
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            # safetensors writes for the owner's eyes only
            (folder / file.name).chmod((folder / "config.json").stat().st_mode)
    progress.stop()
    return Path(target)


def _read_entries(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt"):  # safetensors checks that header and length belong together
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read, it is truncated or no safetensors file: {error}") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        if info["dtype"] not in _DTYPES:
            raise UserError(f"{file}: {name} has the type {info['dtype']}, which sparse_ft does not read.")
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        dtype, shape = _DTYPES[info["dtype"]], tuple(info["shape"])
        assert math.prod(shape) * dtype.itemsize == end - begin
        entries[name] = Entry(file, dtype, shape, begin, end)
    return entries
