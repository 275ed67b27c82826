"""Sparse weights without their zeros: the values that a mask keeps, in order, beside the mask's bits. Arrays to arrays.

Weights are taken as whole numbers of their size (a bfloat16 is a ``uint16``), so that every bit of a kept weight comes
back as it was: the sign of a zero, and what a NaN carries.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparse_ft.masks.mask_set import count_kept, unpacked

__all__ = ["NotZeroError", "kept_values", "restored"]

_BLOCK = 1 << 20  # weights whose mask is unpacked in one go


class NotZeroError(ValueError):
    """Weights that the mask prunes are no zeros.

    Attributes:
        count: how many.
        first: where the first is, as row and column.
    """

    def __init__(self, count: int, first: tuple[int, int]):
        super().__init__(f"{count} pruned weights are not +0.0, the first at {first}")
        self.count, self.first = count, first


def kept_values(weights: np.ndarray, bits: np.ndarray) -> Iterator[np.ndarray]:
    """The values that a mask keeps, in the order of the weights, some rows at a time.

    Args:
        weights: unsigned whole numbers ``[R, C]``.
        bits: ``uint8 [R, ceil(C/8)]``, see `sparse_ft.masks.mask_set.pack_bits`.

    Yields:
        the kept values of the next rows, one after another.

    Raises:
        NotZeroError: a pruned weight that is no zero of positive sign, which nothing would bring back.
    """
    lost, first = 0, (0, 0)
    for begin, end in _blocks(weights.shape):
        block, kept = weights[begin:end], unpacked(bits[begin:end], weights.shape[1])
        values = block[kept]
        if missed := int(np.count_nonzero(block)) - int(np.count_nonzero(values)):
            if not lost:
                row, column = np.argwhere((block != 0) & ~kept)[0].tolist()
                first = begin + row, column
            lost += missed
        if not lost:
            yield values
    if lost:
        raise NotZeroError(lost, first)


def restored(values: np.ndarray, bits: np.ndarray, columns: int) -> np.ndarray:
    """The weights of which ``values`` are those that a mask keeps; the others are zero.

    Args:
        values: ``[K]``, of any type.
        bits: ``uint8 [R, ceil(columns/8)]`` with K bits set.
        columns: of the weights.

    Returns:
        ``[R, columns]`` of the values' type.

    Raises:
        ValueError: the mask keeps more or fewer.
    """
    if count_kept(bits) != values.size:
        raise ValueError(f"{values.size} values for {count_kept(bits)} weights that the mask keeps")
    weights, done = np.zeros((bits.shape[0], columns), values.dtype), 0
    for begin, end in _blocks(weights.shape):
        kept = unpacked(bits[begin:end], columns)
        count = int(np.count_nonzero(kept))
        weights[begin:end][kept] = values[done : done + count]
        done += count
    return weights


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows, columns = shape
    step = max(1, _BLOCK // max(1, columns))
    return ((begin, min(begin + step, rows)) for begin in range(0, rows, step))
