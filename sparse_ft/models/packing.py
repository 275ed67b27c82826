"""Packs a checkpoint into kept values and bits, and gives it back byte for byte. Goes tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder, write_json
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet, packed_shape
from sparse_ft.masks.packed import NotZeroError, kept_values
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_other_files
from sparse_ft.models.entries import Entry, read_header
from sparse_ft.models.folder import PACKED, PACKED_PREFIX
from sparse_ft.models.mixtures import refitted
from sparse_ft.models.names import listed_shapes
from sparse_ft.models.packed import BITS, FORMAT_VERSION, HEADER_KEY, KEPT, PackedCheckpoint, identity_of
from sparse_ft.progress import SILENT, Progress

__all__ = ["is_masked", "pack_checkpoint", "packed_bytes", "unpack_checkpoint"]

_BLOCK = 1 << 24  # bytes copied or hashed in one go


@dataclass(frozen=True)
class _Piece:
    """A tensor of a packed file: whole (``part`` empty), or one of the two that it is packed into."""

    tensor: str
    entry: Entry
    part: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def name(self) -> str:
        return self.entry.name + self.part

    @property
    def itemsize(self) -> int:
        return self.nbytes // max(1, math.prod(self.shape))


def pack_checkpoint(
    source: Checkpoint | str | Path,
    masks: MaskSet,
    target: str | Path,
    progress: Progress = SILENT,
    in_place: bool = False,
) -> PackedCheckpoint:
    """Writes a checkpoint without the weights that masks prune: the values that stay, and one bit a weight.

    Every file of weights has its packed one, so shards stay shards; the rest of the folder is copied. The folder
    appears when it is complete. Memory holds the masks and some rows of a tensor.

    Args:
        source: a plain checkpoint.
        masks: of its prunable tensors.
        target: the new folder.
        progress: told the bytes.
        in_place: the target may be the source, which is then gone once the packed one is complete.

    Raises:
        UserError: masks of another model, or a pruned weight that is not +0.0, which could not be given back.
    """
    source = source if isinstance(source, Checkpoint) else Checkpoint(source)
    _check_target(source, target, in_place)
    shapes = source.prunable_shapes()
    masks = refitted(source.config, masks, shapes)
    check_masks(masks, shapes, f"the checkpoint {source.folder}")
    tensors: dict[str, tuple[Entry, str]] = {}
    progress.start("pack", sum(entry.end - entry.begin for entry in source.stored.values()), "B")
    try:
        with atomic_folder(target) as folder:
            copy_other_files(source, folder)
            if source.weights.index is not None:
                name = source.weights.index.name
                (folder / name).rename(folder / (PACKED_PREFIX + name))
            for file in source.weights.files:
                digests = _pack_file(source, masks, file, folder / (PACKED_PREFIX + file.name), progress)
                tensors |= {e.name: (e, digests[e.name]) for e in source.stored.values() if e.file == file}
            about = {
                "version": FORMAT_VERSION,
                "identity": identity_of(masks.checksum, tensors),
                "fingerprint": source.combined(
                    {name: bytes.fromhex(tensors[entry.name][1]) for name, entry in source.stored.items()}
                ),
                "mask_checksum": masks.checksum,
                "masks": masks.metadata,
                "files": [PACKED_PREFIX + file.name for file in source.weights.files],
                "index": source.weights.index and source.weights.index.name,
            }
            write_json(folder / PACKED, about)
    finally:
        progress.stop()
    return PackedCheckpoint(target)


def unpack_checkpoint(
    source: PackedCheckpoint | str | Path,
    target: str | Path,
    progress: Progress = SILENT,
    in_place: bool = False,
) -> Path:
    """Writes the plain checkpoint that was packed: the very bytes of its files of weights.

    Every tensor is compared with the SHA-256 that it had. The folder appears when it is complete; memory holds the
    largest tensor.

    Args:
        source: a packed checkpoint.
        target: the new folder.
        progress: told the bytes.
        in_place: the target may be the source, which is then gone once the plain one is complete.

    Raises:
        UserError: a folder that is not packed, or a damaged one.
    """
    source = source if isinstance(source, PackedCheckpoint) else PackedCheckpoint(source)
    _check_target(source, target, in_place)
    progress.start("unpack", sum(entry.end for entry in source.stored.values()), "B")
    try:
        with atomic_folder(target) as folder:
            copy_other_files(source, folder)
            (folder / PACKED).unlink()
            if source.weights.index is not None:
                name = source.weights.index.name
                (folder / name).rename(folder / name.removeprefix(PACKED_PREFIX))
            for file in source.weights.files:
                own = [(name, e) for name, e in source.stored.items() if e.file == file]
                header = source.headers[file.name]
                with open(folder / file.name.removeprefix(PACKED_PREFIX), "wb") as written:
                    written.write(len(header).to_bytes(8, "little") + header)
                    for name, entry in sorted(own, key=lambda pair: source.offsets[pair[1].name]):
                        written.write(memoryview(source.raw(name)))
                        progress.advance(entry.end)
    finally:
        progress.stop()
    return Path(target)


def is_masked(source: Checkpoint, masks: MaskSet) -> bool:
    """Whether every weight that the masks prune is +0.0.

    Args:
        source: the checkpoint.
        masks: that fit it.
    """
    for name in masks:
        shape = source.shape(name)
        rows = math.prod(shape[:-1])
        raw = source.raw(name)
        weights = raw.view(f"u{raw.size // max(1, math.prod(shape))}").reshape(rows, shape[-1])
        try:
            for _ in kept_values(weights, masks.bits[name].reshape(rows, -1)):
                pass
        except NotZeroError:
            return False
    return True


def packed_bytes(source: Checkpoint, masks: MaskSet) -> tuple[int, int]:
    """The bytes of a checkpoint's tensors as they are and packed, without the headers of files.

    Args:
        source: the checkpoint.
        masks: that fit it.
    """
    pieces = [piece for file in source.files for piece in _pieces(source, masks, file)]
    return sum(e.end - e.begin for e in source.stored.values()), sum(piece.nbytes for piece in pieces)


def _pieces(source: Checkpoint, masks: MaskSet, file: Path) -> list[_Piece]:
    """The tensors of a packed file, in its order: large types first, so that each lies where it may be mapped."""
    pieces = []
    for name, entry in source.stored.items():
        if entry.file != file:
            continue
        parts, size = listed_shapes(source.stored_config, name, entry.shape), entry.end - entry.begin
        if not set(parts) <= set(masks.shapes):
            pieces.append(_Piece(name, entry, "", entry.stored, entry.shape, size))
            continue
        kept = sum(masks.kept(part) for part in parts)
        itemsize = size // max(1, math.prod(entry.shape))
        pieces.append(_Piece(name, entry, KEPT, entry.stored, (kept,), kept * itemsize))
        shape = packed_shape(entry.shape)
        pieces.append(_Piece(name, entry, BITS, "U8", shape, math.prod(shape)))
    return sorted(pieces, key=lambda piece: (-piece.itemsize, piece.part == BITS, piece.name))


def _pack_file(source: Checkpoint, masks: MaskSet, file: Path, target: Path, progress: Progress) -> dict[str, str]:
    """Writes the packed one of a file; returns the SHA-256 of every tensor of the plain file."""
    pieces = _pieces(source, masks, file)
    names = [piece.name for piece in pieces]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file} cannot be packed: it has a tensor {twice}, as a packed one would be called.")
    plain = read_header(file).decode()
    digests = {piece.entry.name: "0" * 64 for piece in pieces}
    length = len(_header(pieces, plain, digests))
    with open(target, "wb") as written:
        written.write(_header(pieces, plain, digests))
        for piece in pieces:
            if piece.part == BITS:
                for part in listed_shapes(source.stored_config, piece.tensor, piece.entry.shape):
                    written.write(memoryview(masks.bits[part]).cast("B"))
                continue
            hasher = hashlib.sha256()
            for block in _kept(source, masks, piece, hasher) if piece.part else _whole(source, piece, hasher):
                written.write(memoryview(np.ascontiguousarray(block)).cast("B"))
            digests[piece.entry.name] = hasher.hexdigest()
            progress.advance(piece.entry.end - piece.entry.begin)
        written.seek(0)
        header = _header(pieces, plain, digests)
        assert len(header) == length, "digests are of one length"
        written.write(header)
        written.flush()
        os.fsync(written.fileno())
    return digests


def _whole(source: Checkpoint, piece: _Piece, hasher: hashlib._Hash) -> Iterator[np.ndarray]:
    raw = source.raw(piece.tensor)
    for begin in range(0, raw.size, _BLOCK):
        block = raw[begin : begin + _BLOCK]
        hasher.update(block)
        yield block


def _kept(source: Checkpoint, masks: MaskSet, piece: _Piece, hasher: hashlib._Hash) -> Iterator[np.ndarray]:
    """The kept values of a tensor, block by block; every byte of it goes into the hash."""
    raw, row = source.raw(piece.tensor), 0
    for begin in range(0, raw.size, _BLOCK):  # hashing leaves no copy behind
        hasher.update(raw[begin : begin + _BLOCK])
    for part, shape in listed_shapes(source.stored_config, piece.tensor, piece.entry.shape).items():
        rows, columns = math.prod(shape[:-1]), shape[-1]
        width = columns * piece.itemsize
        if rows * columns == 0:
            continue
        weights = raw[row * width : (row + rows) * width].view(f"u{piece.itemsize}").reshape(rows, columns)
        row += rows
        try:
            yield from kept_values(weights, masks.bits[part].reshape(rows, -1))
        except NotZeroError as error:
            where = list(error.first)
            raise UserError(
                f"{source.folder}: {part} has {error.count} weights that the masks prune and that are not +0.0, the"
                f" first at {where}. Packed they would be lost, so nothing is written: are they its masks (sparse-ft"
                " validate)? Zeros of negative sign go with apply_masks and save_model."
            ) from None


def _header(pieces: list[_Piece], plain: str, digests: Mapping[str, str]) -> bytes:
    """Length and header of a packed file, as it begins."""
    told = json.dumps({"version": FORMAT_VERSION, "header": plain, "digests": dict(sorted(digests.items()))})
    entries: dict[str, object] = {"__metadata__": {"format": "pt", HEADER_KEY: told}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.nbytes
        entries[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    return len(text).to_bytes(8, "little") + text


def _check_target(source: Checkpoint, target: str | Path, in_place: bool) -> None:
    folder = Path(target)
    if not in_place and folder.exists() and folder.resolve() == source.folder.resolve():
        raise UserError(f"{folder} is the checkpoint itself; choose another folder for the new one.")
    if not folder.exists() or (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        return
    raise UserError(f"{folder} holds something else than a checkpoint; choose another folder.")
