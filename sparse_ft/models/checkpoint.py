"""A Hugging Face checkpoint folder, read tensor by tensor without loading the model."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.models.entries import Entry, read_entries
from sparse_ft.models.families import is_multimodal, text_name
from sparse_ft.models.folder import WeightFiles, read_json, weight_files
from sparse_ft.models.names import listed_shapes, place, prunable_names
from sparse_ft.models.skeleton import Skeleton, build_skeleton, config_values

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "reading_from"]

_PLAIN = ("float64", "float32", "float16", "bfloat16")
# What quantised weights have beside them; scales of activations and of the key/value cache are none of these.
_SCALES = re.compile(
    r"weight_(scale|zero_point|packed|shape|global_scale).*|weight\..+|scales?|qweight|qzeros|SCB|absmax"
)


class Checkpoint:
    """A folder with ``config.json`` and the safetensors files that transformers loads, one file or shards.

    Nothing but the files' headers is read on opening; tensors are memory-mapped. Which of the tensors are the
    model's own is what transformers' model of that configuration says (`names`); the rest is `carried`.

    A multimodal checkpoint is seen as its text part, with the configuration and the tensor names that this has in a
    checkpoint of its own; what belongs to other modalities is carried.

    Raises:
        UserError: what `weight_files` raises, or a truncated file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.weights: WeightFiles = weight_files(self.folder)
        self._stored: dict[str, Entry] = {}
        for file in self.weights.files:
            self._stored.update(read_entries(file))
        missing = sorted(self.weights.indexed - set(self._stored))
        if missing:
            raise UserError(f"Checkpoint {folder}: its index names {missing[0]}, which no file holds.")
        if self.is_multimodal:
            self._stored = {text_name(name): entry for name, entry in self._stored.items()}

    @cached_property
    def stored_config(self) -> dict[str, Any]:
        """The content of ``config.json``, which may leave values out: for writing it again."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise UserError(f"Checkpoint {self.folder} has no config.json.")
        return read_json(path)

    @cached_property
    def is_multimodal(self) -> bool:
        """Whether there is more in the folder than the language model that is seen."""
        return (self.folder / "config.json").is_file() and is_multimodal(self.stored_config)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration's values as transformers has them, its defaults included."""
        return config_values(self.folder)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """The tensors by name; of experts in one tensor each matrix by itself, as other checkpoints of the family have
        it, so that both are the same to whoever reads them."""
        entries = {}
        for name, entry in self._stored.items():
            begin = entry.begin
            for part, shape in listed_shapes(self.stored_config, name, entry.shape).items():
                end = begin + (entry.end - entry.begin) * math.prod(shape) // max(1, math.prod(entry.shape))
                entries[part] = replace(entry, shape=shape, begin=begin, end=end)
                begin = end
        return entries

    def _has_place(self, name: str) -> bool:
        return place(self.config, name).parameter in self._skeleton.tensors

    @cached_property
    def names(self) -> list[str]:
        """The tensors that the model has a place for, in name order."""
        return sorted(filter(self._has_place, self._entries))

    @cached_property
    def stored_names(self) -> list[str]:
        """`names` as the files have them: the experts of a block may be one tensor."""
        return sorted(filter(self._has_place, self._stored))

    @cached_property
    def carried(self) -> list[str]:
        """The other tensors, in name order: transformers ignores them, and copies of the checkpoint keep them.

        Rotary frequencies in LLaMA-2's own files, scales of the key/value cache, and the like.
        """
        return sorted(set(self._entries).difference(self.names))

    @cached_property
    def prunable(self) -> list[str]:
        """Names of the prunable tensors, in name order.

        Raises:
            UserError: some are missing, of another shape than the model's, or not plain floating-point weights:
                a quantised checkpoint, or one dequantised by half.
        """
        with self._named_as_quantised():
            self._check_plain()
            return prunable_names(self.config, self.names)

    def check(self) -> None:
        """Checks that the tensors are the whole model and plain, so that whatever comes after can be made.

        Raises:
            UserError: as `prunable`, for every tensor of the model.
        """
        with self._named_as_quantised():
            self._check_whole()
        _ = self.prunable

    @cached_property
    def _skeleton(self) -> Skeleton:
        try:
            return build_skeleton(self.config)
        except UserError as error:
            raise UserError(f"Checkpoint {self.folder}: {error}") from error

    @contextmanager
    def _named_as_quantised(self) -> Iterator[None]:
        """Says of weights that do not fit that they are quantised, where config.json does."""
        try:
            yield
        except UserError as error:
            quantised = self.stored_config.get("quantization_config")
            if quantised is None:
                raise
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise UserError(
                f"Checkpoint {self.folder} is quantised (quantization_config in config.json, method {method}) and not"
                f" the plain weights that can be pruned; dequantise it first. {error}"
            ) from None

    def _check_plain(self) -> None:
        for name in self.names:
            if self._entries[name].dtype not in _PLAIN:
                raise UserError(
                    f"Checkpoint {self.folder}: {name} is stored as {self._entries[name].stored}, and only plain"
                    " weights of 16, 32 or 64 bits (F16, BF16, F32, F64) can be pruned."
                )
            wanted, found = self._expected_shape(name), self.shape(name)
            if wanted != found:
                raise UserError(
                    f"Checkpoint {self.folder}: {name} is {list(found)}, and the model of its config.json has"
                    f" {list(wanted)} there. Do config.json and the weights belong together?"
                )
        own = set(self.names)
        for name in self.carried:
            module, dot, _ = name.partition(".weight.")
            if not dot:
                module, _, last = name.rpartition(".")
                module = module if _SCALES.fullmatch(last) else ""
            if f"{module}.weight" in own:
                raise UserError(
                    f"Checkpoint {self.folder}: {name} lies beside {module}.weight, as quantised weights have it, and"
                    " nothing says whether it is already multiplied in. Dequantise the checkpoint, or where that is"
                    " done remove what is left of the quantisation."
                )

    def _check_whole(self) -> None:
        filled = {place(self.config, name).parameter for name in self.names}
        lost = sorted(set(self._skeleton.tensors) - self._skeleton.tied - filled)
        if lost:
            raise UserError(
                f"Checkpoint {self.folder} does not hold the whole model: {len(lost)} tensors are missing, the first"
                f" is {lost[0]}. Is it an adapter that was not merged, or one of another configuration?"
            )

    def _expected_shape(self, name: str) -> tuple[int, ...]:
        slot = place(self.config, name)
        try:
            return slot.view(np.broadcast_to(np.False_, self._skeleton.tensors[slot.parameter])).shape
        except IndexError:  # more experts than the model has
            return ()

    @property
    def stored(self) -> dict[str, Entry]:
        """Every tensor of the files, as it lies there, by name."""
        return dict(self._stored)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold at least one tensor, in name order."""
        return sorted({entry.file for entry in self._stored.values()})

    def shard(self, name: str) -> Path:
        """The file that holds the tensor ``name``."""
        return self._entry(name).file

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor ``name``; one that is a part of a tensor there has its own name only."""
        return self._entry(name).name if self.is_stored(name) else name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype_name(name))

    def dtype_name(self, name: str) -> str:
        """What torch calls the tensor's type: ``bfloat16``.

        Raises:
            UserError: a type that torch does not have.
        """
        entry = self._entry(name)
        if entry.dtype is None:
            raise UserError(f"{entry.file}: {name} has the type {entry.stored}, which sparse_ft does not read.")
        return entry.dtype

    def is_readable(self, name: str) -> bool:
        """Whether the tensor is of a type that torch has."""
        return self._entry(name).dtype is not None

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.begin

    def is_stored(self, name: str) -> bool:
        """Whether the files have a tensor of that name: not one matrix of experts that lie in one tensor."""
        return name in self._stored

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
        import torch

        entry = self._entry(name)
        return torch.from_numpy(np.array(self.raw(name))).view(self.dtype(name)).reshape(entry.shape)

    def prunable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every prunable tensor, by name."""
        return {name: self.shape(name) for name in self.prunable}

    def rows(self, name: str, which: slice) -> torch.Tensor:
        """A range of a tensor's rows (along its first axis), in memory of its own; of the file no more is read."""
        import torch

        shape = self.shape(name)
        if not shape:
            return self.tensor(name)
        first, last, _ = which.indices(shape[0])
        size, found = (
            self.nbytes(name) // max(1, shape[0]),
            torch.empty(last - first, *shape[1:], dtype=self.dtype(name)),
        )
        if found.numel():
            found.view(torch.uint8).numpy().reshape(-1)[:] = self.raw(name)[first * size : last * size]
        return found

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell these weights from any others.

        SHA-256 over every tensor's name, dtype, shape and bytes, in name order: one changed bit anywhere changes it,
        and how the tensors are spread over files does not. Reads the whole checkpoint once, on all cores.
        """

        def digest(name: str) -> bytes:
            return hashlib.sha256(self.raw(name)).digest()

        names = self.stored_names
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter to others
            return self.combined(dict(zip(names, pool.map(digest, names), strict=True)))

    def combined(self, digests: Mapping[str, bytes]) -> str:
        """The `fingerprint` of the SHA-256 of every tensor's bytes, by the name that `stored` has.

        Args:
            digests: more than the model's own are no matter.
        """
        identity = hashlib.sha256()
        for name in self.stored_names:
            identity.update(f"{name} {self._entry(name).described}\n".encode() + digests[name])
        return identity.hexdigest()[:16]

    def is_called(self, fingerprint: str | None) -> bool:
        """Whether a fingerprint is the one of these weights; runs and masks of version 0.1.0 hold its shorter one."""
        return fingerprint in (self.fingerprint, self._sampled_fingerprint)

    @cached_property
    def _sampled_fingerprint(self) -> str:
        """Version 0.1.0's: every prunable tensor's name, dtype, shape and 12 KiB (head, middle, tail) of its bytes."""
        identity = hashlib.sha256()
        for name in prunable_names(self.config, self.stored_names):
            entry, raw = self._entry(name), self.raw(name)
            identity.update(f"{name} {entry.described}\n".encode())
            for start in (0, max(0, raw.size // 2 - 2048), max(0, raw.size - 4096)):
                identity.update(raw[start : start + 4096].tobytes())
        return identity.hexdigest()[:16]

    def _entry(self, name: str) -> Entry:
        try:
            return self._stored[name] if name in self._stored else self._entries[name]
        except KeyError:
            raise UserError(f"Checkpoint {self.folder} has no tensor {name}.") from None


@contextmanager
def reading_from(raw: np.ndarray) -> Iterator[Callable[[np.ndarray, int], None]]:
    """`Checkpoint.reading` of bytes that are in memory."""

    def read(buffer: np.ndarray, begin: int) -> None:
        view = buffer.reshape(-1).view(np.uint8)
        view[:] = raw[begin : begin + view.size]

    yield read
