"""The dithered rounding of `sparse_ft.lora.rounding` as one compiled pass, for a CPU; the same bits."""

from __future__ import annotations

from numba import njit, uint16, uint32, void

__all__ = ["dither_bfloat16"]

_LOW, _SIGNLESS, _LARGEST, _SIXTEEN = (uint32(value) for value in (0xFFFF, 0x7FFFFFFF, 0x7F7F0000, 16))


@njit(nogil=True, inline="always")
def _hash(x):
    x = uint32((x ^ (x >> uint32(16))) * uint32(0x7FEB352D))
    x = uint32((x ^ (x >> uint32(15))) * uint32(0x846CA68B))
    return uint32(x ^ (x >> uint32(16)))


@njit(nogil=True, inline="always")
def _cut(bits, noise):
    added = uint32(bits + noise) if (bits & _SIGNLESS) < _LARGEST else bits
    return uint16(added >> _SIXTEEN)


@njit(void(uint32[:, ::1], uint16[:, ::1], uint32, uint32), cache=True, nogil=True)
def dither_bfloat16(bits, out, key, first_row):
    """Writes the bits of bfloat16 for those of float32 ``bits [R, C]`` into ``out [R, C]``; see `dither_into`."""
    rows, columns = bits.shape
    pairs = uint32((columns + 1) // 2)
    for r in range(rows):
        begin = uint32(uint32(first_row + uint32(r)) * pairs)
        for p in range(columns // 2):
            mixed = _hash(uint32(uint32(begin + uint32(p)) ^ key))
            out[r, 2 * p] = _cut(bits[r, 2 * p], uint32(mixed & _LOW))
            out[r, 2 * p + 1] = _cut(bits[r, 2 * p + 1], uint32(mixed >> _SIXTEEN))
        if columns % 2:
            mixed = _hash(uint32(uint32(begin + pairs - uint32(1)) ^ key))
            out[r, columns - 1] = _cut(bits[r, columns - 1], uint32(mixed & _LOW))
