"""Masks as files: three formats, one identity; checked when read, whole or absent when written."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_path
from sparse_ft.masks.mask_set import MaskSet, combine_digests, packed_shape
from sparse_ft.masks.readers import HEADER_KEY, NotOursError, read_npz, read_pt, read_safetensors

__all__ = ["FORMAT_VERSION", "HEADER_ROOM", "MaskFileWriter", "load_masks", "save_masks"]

FORMAT_VERSION = 1
HEADER_ROOM = 64 * 1024  # bytes kept free for metadata that is known only when the last mask is written
_FLUSH = 8 << 20  # bytes written to a file between two hints to the kernel


def save_masks(masks: MaskSet, path: str | Path) -> Path:
    """Writes a mask set; the suffix chooses the format: ``.safetensors``, ``.npz`` or ``.pt``.

    Raises:
        UserError: another suffix.
    """
    writers = {".safetensors": _save_safetensors, ".npz": _save_npz, ".pt": _save_pt}
    _by_suffix(path, writers)(masks, Path(path))
    return Path(path)


def load_masks(path: str | Path) -> MaskSet:
    """Reads a mask set and checks it: format version, shapes, bits beyond the row's end, checksum.

    Raises:
        UserError: the file is missing, truncated, edited, or no mask file of sparse_ft.
    """
    path = Path(path)
    with _one_line(path):
        header, packed = _by_suffix(path, _READERS)(path)
        _check_version(path, header)
        masks = MaskSet(packed, header["shapes"], header["metadata"])
        found = masks.checksum
    if found != header["checksum"]:
        raise UserError(
            f"Mask file {path} was changed after it was written: its checksum is {found[:12]}, it says"
            f" {header['checksum'][:12]}. Make it again with compute_masks."
        )
    return masks


def make_header(checksum: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]) -> str:
    """The JSON that every format carries."""
    header = {
        "version": FORMAT_VERSION,
        "checksum": checksum,
        "shapes": {name: list(shapes[name]) for name in sorted(shapes)},
        "metadata": dict(metadata),
    }
    return json.dumps(header, allow_nan=False)


class MaskFileWriter:
    """Writes a ``.safetensors`` mask file tensor by tensor, in any order, from several threads.

    Memory stays at one packed tensor. The file appears under its name at ``close``; ``abort`` (or a
    killed process) leaves what was there before.

    Args:
        path: the file to write.
        shapes: shape of every mask, by name.
    """

    def __init__(self, path: str | Path, shapes: Mapping[str, tuple[int, ...]]):
        self.path = Path(path)
        self.shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, shape in self.shapes.items():
            size = int(np.prod(packed_shape(shape), dtype=np.int64))
            self._offsets[name] = (end, end + size)
            end += size
        # safetensors allows spaces after the header's JSON, so its length can be fixed before its text is.
        longest = len(self._header_bytes("0" * 64, {})) + HEADER_ROOM
        self._header_size = (longest + 7) // 8 * 8
        self._digests: dict[str, bytes] = {}
        self._begun: dict[str, tuple[Any, int]] = {}  # SHA-256 so far and bytes so far of unfinished tensors
        self._unflushed = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.stem}.{uuid.uuid4().hex[:8]}.part.safetensors")
        self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, name: str, packed: np.ndarray) -> None:
        """Writes the packed bits ``uint8 [..., ceil(C/8)]`` of one mask.

        Raises:
            ValueError: bits of another shape or dtype, or a name written twice.
        """
        if packed.dtype != np.uint8 or packed.shape != packed_shape(self.shapes[name]):
            raise ValueError(f"{name}: bits {packed.dtype} {packed.shape} do not fit {self.shapes[name]}")
        if name in self._digests or name in self._begun:
            raise ValueError(f"{name} is written twice")
        self.append(name, packed)

    def append(self, name: str, packed: np.ndarray) -> None:
        """Writes the next rows of one mask, so that memory need not hold a whole one.

        The rows of one tensor come in order and from one thread at a time; tensors may be interleaved.

        Raises:
            ValueError: more bytes than the tensor has.
        """
        view = memoryview(np.ascontiguousarray(packed)).cast("B")
        begin, end = self._offsets[name]
        hasher, done = self._begun.get(name) or (hashlib.sha256(), 0)
        if name in self._digests or begin + done + len(view) > end:
            raise ValueError(f"{name}: more rows than {self.shapes[name]} has")
        hasher.update(view)
        self._begun[name] = (hasher, done + len(view))
        if begin + done + len(view) == end:
            self._digests[name] = hasher.digest()
            del self._begun[name]
        offset = 8 + self._header_size + begin + done
        self._unflushed += len(view)
        while view:  # pwrite may write less than asked
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
        if self._unflushed >= _FLUSH:
            self._start_flushing()

    def read(self, name: str) -> np.ndarray:
        """The packed bits of a mask that was written to its end, before the file is closed."""
        begin, _ = self._offsets[name]
        packed, offset = np.empty(packed_shape(self.shapes[name]), np.uint8), 8 + self._header_size + begin
        view = memoryview(packed).cast("B")
        while view:  # preadv may read less than asked
            count = os.preadv(self._file, [view], offset)
            view, offset = view[count:], offset + count
        return packed

    def close(self, metadata: Mapping[str, Any]) -> str:
        """Finishes the file with its metadata; returns the checksum.

        Raises:
            ValueError: a mask was not written, or the metadata exceed 64 KiB.
        """
        missing = set(self.shapes) - set(self._digests)
        if missing:
            self.abort()
            raise ValueError(f"masks not written: {sorted(missing)[:5]}")
        checksum = combine_digests({n: (self.shapes[n], self._digests[n]) for n in self.shapes})
        header = self._header_bytes(checksum, metadata)
        if len(header) > self._header_size:
            self.abort()
            raise ValueError(f"the metadata of {self.path} exceed {HEADER_ROOM} bytes")
        os.pwrite(self._file, self._header_size.to_bytes(8, "little") + header.ljust(self._header_size), 0)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        os.replace(self._temporary, self.path)
        return checksum

    def abort(self) -> None:
        """Removes what was written; a file of the same name from before stays. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temporary.unlink(missing_ok=True)

    def _start_flushing(self) -> None:
        """Lets the disk begin with what was written, and forgets what it has: the masks of a 7B model at ten levels
        would otherwise fill the page cache, push the weights out of it, and all be waited for at the end."""
        self._unflushed = 0
        if hasattr(os, "posix_fadvise"):  # Linux; elsewhere the kernel decides
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _header_bytes(self, checksum: str, metadata: Mapping[str, Any]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {HEADER_KEY: make_header(checksum, self.shapes, metadata)}}
        for name, (begin, end) in self._offsets.items():
            shape = list(packed_shape(self.shapes[name]))
            entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}
        return json.dumps(entries).encode()


def _save_safetensors(masks: MaskSet, path: Path) -> None:
    writer = MaskFileWriter(path, masks.shapes)
    try:
        for name, packed in masks.bits.items():
            writer.write(name, packed)
        writer.close(masks.metadata)
    finally:
        writer.abort()


def _save_npz(masks: MaskSet, path: Path) -> None:
    header = make_header(masks.checksum, masks.shapes, masks.metadata).encode()
    with atomic_path(path) as temporary:
        np.savez(temporary, **{HEADER_KEY: np.frombuffer(header, np.uint8)}, **masks.bits)


def _save_pt(masks: MaskSet, path: Path) -> None:
    import torch

    header = make_header(masks.checksum, masks.shapes, masks.metadata)
    with atomic_path(path) as temporary:
        torch.save({HEADER_KEY: header, "bits": masks.packed}, temporary)


_READERS = {".safetensors": read_safetensors, ".npz": read_npz, ".pt": read_pt}


def _by_suffix(path: str | Path, choices: Mapping[str, Callable]) -> Callable:
    suffix = Path(path).suffix
    if suffix not in choices:
        raise UserError(f"Mask file {path}: the suffix '{suffix}' is none of {', '.join(choices)}.")
    return choices[suffix]


def _check_version(path: Path, header: Mapping[str, Any]) -> None:
    if header["version"] != FORMAT_VERSION:
        found = str(header["version"])[:60]
        raise UserError(f"Mask file {path} has format version {found}, this program reads {FORMAT_VERSION}.")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever three foreign parsers say of bytes that anybody may have made, as a UserError."""
    if not path.is_file():
        raise UserError(f"Mask file {path} does not exist. Make it with compute_masks.")
    try:
        yield
    except UserError:
        raise
    except NotOursError:
        raise UserError(f"{path} is no mask file of sparse_ft. Make one with compute_masks.") from None
    except MemoryError:  # the readers take little more than the file has
        size = path.stat().st_size
        raise UserError(
            f"Mask file {path} has {size:,} bytes, and this process may not take that much memory."
        ) from None
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"Mask file {path} cannot be read, it is truncated, damaged or foreign: {said}") from None
