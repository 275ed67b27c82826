"""A packed checkpoint seen as the plain one of the same weights.

A folder with ``packed.json`` and, for every safetensors file of the checkpoint, one of its name behind ``packed.``: a
prunable tensor NAME is ``NAME.kept``, the values that its mask keeps, and ``NAME.bits``, one bit a weight; any other
tensor is as it was. The header of the plain file, and the SHA-256 of each of its tensors, stand in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet, count_kept, packed_shape
from sparse_ft.masks.packed import restored
from sparse_ft.models.checkpoint import Checkpoint, reading_from
from sparse_ft.models.entries import Entry, read_entries, read_header
from sparse_ft.models.families import text_name
from sparse_ft.models.folder import PACKED, PACKED_PREFIX, WeightFiles, read_json
from sparse_ft.models.names import listed_shapes

if TYPE_CHECKING:
    import torch

__all__ = ["BITS", "FORMAT_VERSION", "HEADER_KEY", "KEPT", "PackedCheckpoint", "identity_of"]

FORMAT_VERSION = 1
HEADER_KEY = "sparse_ft_packed"
KEPT, BITS = ".kept", ".bits"


def identity_of(mask_checksum: str, tensors: Mapping[str, tuple[Entry, str]]) -> str:
    """The identity of packed weights, 64 hex digits: the same however they are spread over files.

    Args:
        mask_checksum: of the masks.
        tensors: by the file's name, its place in the plain file and the SHA-256 of its bytes there.
    """
    identity = hashlib.sha256(mask_checksum.encode())
    for name in sorted(tensors):
        entry, digest = tensors[name]
        identity.update(json.dumps([name, entry.stored, list(entry.shape), digest], ensure_ascii=False).encode())
    return identity.hexdigest()


class PackedCheckpoint(Checkpoint):
    """A packed folder under the names and shapes of the plain checkpoint, one tensor in memory at a time.

    What reads a `Checkpoint` (validation, fingerprints, loading) reads this. Every tensor that is restored is compared
    with its SHA-256.

    Raises:
        UserError: a folder that is not packed, or one that is incomplete or was changed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = _read_about(self.folder)
        index = self.about["index"]
        files = tuple(self.folder / name for name in self.about["files"])
        self.weights = WeightFiles(files, index and self.folder / (PACKED_PREFIX + index))
        self.headers: dict[str, bytes] = {}
        self._here: dict[str, Entry] = {}
        plain: dict[str, Entry] = {}
        self._digests: dict[str, str] = {}
        for file in files:
            if not file.is_file():
                raise UserError(f"Checkpoint {folder} is incomplete: {file.name} is missing.")
            self._here |= read_entries(file)
            self.headers[file.name], digests = _read_metadata(file)
            entries = read_entries(file, self.headers[file.name])
            if set(entries) != set(digests):
                raise UserError(f"{file} is damaged: it has digests of other tensors than it holds.")
            plain |= entries
            self._digests |= digests
        told = {name: (entry, self._digests[name]) for name, entry in plain.items()}
        if identity_of(self.about["mask_checksum"], told) != self.about["identity"]:
            raise UserError(f"Checkpoint {folder} was changed after it was packed: its files are of different weights.")
        self.offsets = {name: entry.begin for name, entry in plain.items()}
        for name, entry in plain.items():
            plain[name] = Entry(entry.file, entry.dtype, entry.shape, 0, entry.end - entry.begin, entry.stored, name)
            self._check_pieces(plain[name])
        self._stored = {text_name(name): entry for name, entry in plain.items()} if self.is_multimodal else plain

    @property
    def identity(self) -> str:
        """See `identity_of`."""
        return self.about["identity"]

    @cached_property
    def masks(self) -> MaskSet:
        """The masks, by the names that masks of the plain checkpoint have."""
        bits, shapes = {}, {}
        for name, entry in self._stored.items():
            if (here := self._here.get(entry.name + BITS)) is None:
                continue
            whole, row = _map(here).reshape(-1, packed_shape(entry.shape)[-1]), 0
            for part, shape in listed_shapes(self.stored_config, name, entry.shape).items():
                rows = math.prod(shape[:-1])
                bits[part] = np.array(whole[row : row + rows]).reshape(packed_shape(shape))
                shapes[part], row = shape, row + rows
        masks = MaskSet(bits, shapes, self.about["masks"])
        if masks.checksum != self.about["mask_checksum"]:
            raise UserError(f"Checkpoint {self.folder} is damaged: its bits are not those of its masks.")
        return masks

    def raw(self, name: str) -> np.ndarray:
        """The bytes that the tensor has in the plain checkpoint, ``uint8 [nbytes]``.

        Raises:
            UserError: they are others than were packed.
        """
        entry = self._entry(name)
        data = self._bytes(entry)
        if self.is_stored(name) and hashlib.sha256(data).hexdigest() != self._digests[entry.name]:
            raise UserError(f"Checkpoint {self.folder} is damaged: {name} is not what was packed.")
        return data

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        raw = self.raw(name)
        raw = raw if raw.flags.writeable and raw.flags.owndata else np.array(raw)
        return torch.from_numpy(raw).view(self.dtype(name)).reshape(self.shape(name))

    def offset(self, name: str) -> int:
        raise UserError(f"Checkpoint {self.folder} is packed: its tensors are no plain runs of bytes; unpack it first.")

    def reading(self, name: str) -> AbstractContextManager[Callable[[np.ndarray, int], None]]:
        return reading_from(self.raw(name))

    def _bytes(self, entry: Entry) -> np.ndarray:
        size = entry.end - entry.begin
        if (plain := self._here.get(entry.name)) is not None:
            return _map(plain)[entry.begin : entry.end]
        if size == 0:
            return np.empty(0, np.uint8)
        kept, bits = self._here[entry.name + KEPT], self._here[entry.name + BITS]
        columns, rows = entry.shape[-1], math.prod(entry.shape[:-1])
        itemsize = size // (rows * columns)
        every = _map(bits).reshape(-1, bits.shape[-1])
        first = entry.begin // (columns * itemsize)
        own, skipped = every[first : first + rows], count_kept(every[:first])
        values = _map(kept).view(f"u{itemsize}")[skipped : skipped + count_kept(own)]
        return restored(values, own, columns).reshape(-1).view(np.uint8)

    def _check_pieces(self, entry: Entry) -> None:
        """Whether the file holds what the tensor is made of, in sizes that fit."""
        plain, size = self._here.get(entry.name), entry.end - entry.begin
        if plain is not None:
            fits = plain.end - plain.begin == size
        else:
            kept, bits = self._here.get(entry.name + KEPT), self._here.get(entry.name + BITS)
            fits = kept is not None and bits is not None and len(entry.shape) > 1
            if fits:
                itemsize = size // max(1, math.prod(entry.shape))
                fits = bits.shape == packed_shape(entry.shape) and bits.stored == "U8"
                fits = fits and kept.end - kept.begin == count_kept(_map(bits)) * itemsize
        if not fits:
            raise UserError(f"Checkpoint {self.folder} is damaged: {entry.name} is not there as it was packed.")


def _map(entry: Entry) -> np.ndarray:
    """A tensor's bytes in its file, ``uint8``; in the tensor's shape where that is one of bytes."""
    if entry.end == entry.begin:
        return np.empty(entry.shape if entry.stored == "U8" else 0, np.uint8)
    raw = np.memmap(entry.file, np.uint8, "r", entry.begin, (entry.end - entry.begin,))
    return raw.reshape(entry.shape) if entry.name.endswith(BITS) else raw


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / PACKED
    if not path.is_file():
        raise UserError(f"{folder} is no packed checkpoint: it has no {PACKED}. Make one with sparse-ft pack.")
    about = read_json(path)
    if about.get("version") != FORMAT_VERSION:
        found = str(about.get("version"))[:60]
        raise UserError(f"Checkpoint {folder} is packed in version {found}; this program reads {FORMAT_VERSION}.")
    kinds = {"identity": str, "mask_checksum": str, "fingerprint": str, "files": list, "masks": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    names = [*(about.get("files") or []), *([] if about.get("index") is None else [about["index"]])]
    if wrong or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise UserError(f"{path} is damaged: it does not say what is packed.")
    return about


def _read_metadata(file: Path) -> tuple[bytes, dict[str, str]]:
    """The header of the plain file, and the SHA-256 of every tensor there."""
    try:
        told = json.loads(json.loads(read_header(file))["__metadata__"][HEADER_KEY])
        return told["header"].encode(), {str(name): str(digest) for name, digest in told["digests"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{file} is no file of a packed checkpoint.") from None
