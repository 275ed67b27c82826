"""Compiled loops over integer keys: counting, comparing, packing, ranking.

A *key* is an unsigned integer in the order of the score it stands for. All functions release the GIL, take
C-contiguous arrays and allocate at most one row or one histogram. They are compiled on first use and cached.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = [
    "add_column_sums",
    "add_digit_histogram",
    "add_histogram",
    "count_equal",
    "group_ranks",
    "pack_at_least",
    "random_keys",
    "row_ranks",
    "strip_signs",
]


@njit(cache=True, nogil=True)
def add_histogram(keys, counts):
    """Adds the number of each key (1-D unsigned) to ``counts`` (uint32, longer than the largest key).

    Two tables take turns: a run of equal keys then does not wait for its own store.
    """
    other = np.zeros(counts.size, np.uint32)
    pairs = keys.size // 2 * 2
    for i in range(0, pairs, 2):
        counts[keys[i]] += np.uint32(1)
        other[keys[i + 1]] += np.uint32(1)
    if pairs < keys.size:
        counts[keys[pairs]] += np.uint32(1)
    for i in range(counts.size):
        counts[i] += other[i]


@njit(cache=True, nogil=True)
def add_digit_histogram(keys, prefixes, counts):
    """Counts the low 16 bits of those uint32 keys whose high 16 bits are one of ``prefixes``.

    Args:
        keys: uint32 ``[n]``.
        prefixes: int64 ``[p]``, distinct.
        counts: uint32 ``[p, 65536]``, added to.
    """
    where = np.full(65536, -1, np.int16)
    for p in range(prefixes.size):
        where[prefixes[p]] = p
    for i in range(keys.size):
        row = where[keys[i] >> np.uint32(16)]
        if row >= 0:
            counts[row, keys[i] & np.uint32(0xFFFF)] += np.uint32(1)


@njit(cache=True, nogil=True)
def count_equal(keys, value):
    """Number of keys (1-D) equal to ``value``."""
    found = 0
    for i in range(keys.size):
        found += keys[i] == value
    return found


@njit(cache=True, nogil=True)
def strip_signs(keys, mask):
    """Keeps the bits of ``mask`` in every key (1-D, in place); returns the largest key."""
    largest = keys.dtype.type(0)
    for i in range(keys.size):
        key = keys[i] & mask
        keys[i] = key
        largest = max(largest, key)
    return largest


@njit(cache=True, nogil=True)
def pack_at_least(keys, bounds, out):
    """Packs ``keys[r, c] >= bounds[r]`` into bits, little-endian along the row, rows padded with 0.

    Args:
        keys: unsigned ``[R, C]``.
        bounds: ``[R]``, of the keys' dtype.
        out: uint8 ``[R, ceil(C/8)]``, overwritten.
    """
    rows, columns = keys.shape
    flags = np.zeros((columns + 7) // 8 * 8, np.uint8)
    words = flags.view(np.uint64)
    for r in range(rows):
        bound = bounds[r]
        for c in range(columns):
            flags[c] = np.uint8(keys[r, c] >= bound)
        for w in range(words.size):  # eight 0/1 bytes to eight bits by one multiplication
            out[r, w] = np.uint8((words[w] * np.uint64(0x0102040810204080)) >> np.uint64(56))


@njit(cache=True, nogil=True)
def row_ranks(keys, ranks):
    """Rank of each key in its row, ascending, ties by position.

    A least-significant-digit radix sort of 8 bits a pass, which is stable.

    Args:
        keys: unsigned ``[R, C]``.
        ranks: uint32 ``[R, C]``, overwritten with 0..C-1.
    """
    rows, columns = keys.shape
    order = np.empty(columns, np.uint32)
    spare = np.empty(columns, np.uint32)
    starts = np.empty(256, np.int64)
    for r in range(rows):
        for c in range(columns):
            order[c] = c
        for shift in range(0, keys.itemsize * 8, 8):
            starts[:] = 0
            for c in range(columns):
                starts[(keys[r, c] >> shift) & 0xFF] += 1
            total = 0
            for digit in range(256):
                count = starts[digit]
                starts[digit] = total
                total += count
            for c in range(columns):
                digit = (keys[r, order[c]] >> shift) & 0xFF
                spare[starts[digit]] = order[c]
                starts[digit] += 1
            order, spare = spare, order
        for c in range(columns):
            ranks[r, order[c]] = c


@njit(cache=True, nogil=True)
def group_ranks(keys, group, ranks):
    """Rank of each key among the ``group`` consecutive keys of its row it belongs to, ties by position.

    Args:
        keys: unsigned ``[R, C]``, C a multiple of ``group``.
        ranks: uint8 ``[R, C]``, overwritten with 0..group-1; so ``group`` is at most 256.
    """
    rows, columns = keys.shape
    for r in range(rows):
        for start in range(0, columns, group):
            for i in range(group):
                key = keys[r, start + i]
                rank = 0
                for j in range(i):
                    rank += keys[r, start + j] <= key
                for j in range(i + 1, group):
                    rank += keys[r, start + j] < key
                ranks[r, start + i] = rank


@njit(cache=True, nogil=True)
def random_keys(stream, first, out):
    """Writes 31 random bits per position: the SplitMix64 generator, whose n-th value needs no other.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014).

    Args:
        stream: uint64, the generator's key.
        first: uint64, position of ``out[0]``.
        out: uint32 ``[n]``, overwritten.
    """
    for i in range(out.size):
        z = stream + (first + np.uint64(i) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = np.uint32((z ^ (z >> np.uint64(31))) >> np.uint64(33))


@njit(cache=True, nogil=True)
def add_column_sums(scores, sums):
    """Adds the rows of ``scores`` (float32 ``[R, C]``) to ``sums`` (float64 ``[C]``), one after another.

    Rows handed in one call or in several give the same bits.
    """
    rows, columns = scores.shape
    for r in range(rows):
        for c in range(columns):
            sums[c] += scores[r, c]
