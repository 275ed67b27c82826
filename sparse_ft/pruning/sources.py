"""Where integer keys come from: weights in files, random numbers, computed scores.

A source hands out the keys of a tensor a few rows at a time, in order, as often as asked, so that memory
holds one part per thread whatever the size of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning.kernels import random_keys, strip_signs

__all__ = ["PART", "KeySource", "MagnitudeSource", "RandomSource", "ScoreSource", "ordered_keys", "row_parts"]

PART = 1 << 20  # weights in one part: few megabytes, and large enough that calls cost nothing

_DIGITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


class KeySource(Protocol):
    """Keys of named tensors, part by part."""

    shapes: dict[str, tuple[int, ...]]

    def kind(self, name: str) -> str:
        """What the keys are; keys of one kind compare across tensors as they are."""
        ...

    def wide(self, name: str) -> bool:
        """True if the tensor's keys are uint32 by nature, False for uint16 (below 32,768)."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that one reading of the tensor costs, for the progress bar."""
        ...

    def parts(self, name: str, widen: bool = False) -> Iterator[np.ndarray]:
        """The keys as ``[rows, C]`` arrays, rows in order; each is only valid until the next is asked for.

        Args:
            widen: give uint32 keys that compare across tensors of every dtype.
        """
        ...

    def scores(self, name: str) -> Iterator[np.ndarray]:
        """The scores themselves, float32 ``[rows, C]``, in the same parts."""
        ...


def row_parts(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Splits a tensor of ``shape`` into runs of whole rows of at most PART weights (at least one row).

    Yields:
        (first row, past-the-end row, columns), rows counted over all leading axes.
    """
    columns = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    step = max(1, PART // max(1, columns))
    for first in range(0, rows, step):
        yield first, min(rows, first + step), columns


def ordered_keys(scores: np.ndarray) -> np.ndarray:
    """uint32 keys in the order of float32 ``scores``; -0.0 and 0.0 are one key.

    The sign bit is flipped for positive numbers, all bits for negative ones.
    """
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))


class MagnitudeSource:
    """|w| of a checkpoint's tensors, straight from the files' bytes.

    Without its sign bit a float is an integer in the order of its magnitude: 15 bits for bfloat16 and
    float16, 31 for float32. Nothing is rounded, so equal keys are equal weights.

    Raises:
        UserError: a dtype without such keys; while reading, a NaN or infinite weight (names the tensor).
    """

    def __init__(self, checkpoint: Checkpoint, names: list[str]):
        self.checkpoint = checkpoint
        self.shapes = {name: checkpoint.shape(name) for name in names}
        for name in names:
            if checkpoint.dtype_name(name) not in _DIGITS:
                raise UserError(
                    f"{name} in {checkpoint.folder} is {checkpoint.dtype_name(name)}; magnitudes are read from"
                    " bfloat16, float16 and float32 weights. Convert the checkpoint first."
                )

    def kind(self, name: str) -> str:
        return self.checkpoint.dtype_name(name)

    def wide(self, name: str) -> bool:
        return self.checkpoint.dtype_name(name) == "float32"

    def nbytes(self, name: str) -> int:
        return self.checkpoint.nbytes(name)

    def parts(self, name: str, widen: bool = False) -> Iterator[np.ndarray]:
        dtype = self.checkpoint.dtype_name(name)
        digits = _DIGITS[dtype]
        magnitude_bits = digits(0x7FFF if digits is np.uint16 else 0x7FFFFFFF)
        itemsize = np.dtype(digits).itemsize
        buffer = None
        with self.checkpoint.reading(name) as read:
            for first, last, columns in row_parts(self.shapes[name]):
                if buffer is None:
                    buffer = np.empty((last - first, columns), digits)
                keys = buffer[: last - first]
                read(keys, first * columns * itemsize)
                if strip_signs(keys.reshape(-1), magnitude_bits) >= _INFINITY[dtype]:
                    raise UserError(
                        f"{name} in {self.checkpoint.shard(name)} holds NaN or infinite weights, which have"
                        " no place in an order. Repair the checkpoint first."
                    )
                yield _widened(keys, dtype) if widen and digits is np.uint16 else keys

    def scores(self, name: str) -> Iterator[np.ndarray]:
        for keys in self.parts(name, widen=True):
            yield keys.view(np.float32)


class RandomSource:
    """31 random bits per weight, a function of (seed, tensor name, position) and of nothing else."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self.shapes = dict(shapes)
        self.seed = seed

    def kind(self, name: str) -> str:
        return "random"

    def wide(self, name: str) -> bool:
        return True

    def nbytes(self, name: str) -> int:
        return 4 * int(np.prod(self.shapes[name], dtype=np.int64))

    def parts(self, name: str, widen: bool = False) -> Iterator[np.ndarray]:
        key = hashlib.sha256(f"{self.seed}\n{name}".encode()).digest()[:8]
        stream = np.uint64(int.from_bytes(key, "little"))
        for first, last, columns in row_parts(self.shapes[name]):
            keys = np.empty((last - first, columns), np.uint32)
            random_keys(stream, np.uint64(first * columns), keys.reshape(-1))
            yield keys

    def scores(self, name: str) -> Iterator[np.ndarray]:
        for keys in self.parts(name):
            yield keys.astype(np.float32)


class ScoreSource:
    """Keys of float32 scores that ``load(name)`` gives, in memory, memory-mapped or computed on demand.

    Raises:
        UserError: while reading, NaN or infinite scores (names the tensor).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], np.ndarray]):
        self.shapes = dict(shapes)
        self._load = load

    def kind(self, name: str) -> str:
        return "scores"

    def wide(self, name: str) -> bool:
        return True

    def nbytes(self, name: str) -> int:
        return 4 * int(np.prod(self.shapes[name], dtype=np.int64))

    def parts(self, name: str, widen: bool = False) -> Iterator[np.ndarray]:
        for part in self.scores(name):
            yield ordered_keys(part)

    def scores(self, name: str) -> Iterator[np.ndarray]:
        scores = self._load(name)
        if scores.shape != self.shapes[name] or scores.dtype != np.float32:
            raise ValueError(f"{name}: scores are {scores.dtype} {scores.shape}, not float32 {self.shapes[name]}")
        scores = scores.reshape(-1, scores.shape[-1])
        for first, last, _ in row_parts(self.shapes[name]):
            part = scores[first:last]
            if not np.isfinite(part).all():
                raise UserError(f"{name}: its importance scores hold NaN or infinite values.")
            yield part


def _widened(keys: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return keys.astype(np.uint32) << np.uint32(16)
    return keys.view(np.float16).astype(np.float32).view(np.uint32)
