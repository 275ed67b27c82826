"""Dithered rounding of float32 to bfloat16 or float16: what is cut off decides how likely the value is rounded up.

A value that lies a quarter of the way from one representable number to the next becomes the next one with
probability 1/4, so sums of small updates survive in the mean, where rounding to the nearest loses every one of
them (Gupta et al. 2015, https://arxiv.org/abs/1502.02551, call it stochastic rounding). The noise here is fixed: it
belongs to an element of a parameter, as a hash of its position and a key (lowbias32 of Wellons,
https://nullprogram.com/blog/2018/07/31/). Nothing is stored, and the same value at the same place is rounded in the
same way in forward, backward, merge and rebuild, on every device, by any number of threads, in blocks of any size.

Pure tensors in, tensors out; imports neither PEFT nor transformers, and numba only where it is used.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["DITHERED_DTYPES", "block_rows", "dither", "dither_into", "noise_key"]

DITHERED_DTYPES = (torch.bfloat16, torch.float16)

_BLOCK = {"cpu": 1 << 17}  # elements that a CPU's cache holds with all temporaries
_BLOCK_ELSEWHERE = 1 << 24
_KERNEL_THREADS = 16  # the compiled loop runs on one thread and is as fast as torch's on so many
_LARGEST = {torch.bfloat16: torch.finfo(torch.bfloat16).max, torch.float16: torch.finfo(torch.float16).max}


@lru_cache(maxsize=1 << 16)
def noise_key(name: str, seed: int = 0) -> int:
    """The key, 32 bits, of a parameter's noise: from SHA-256 of its name in the plain model and a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


def dither(values: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """``values``, float32, rounded to ``dtype`` by the noise of ``key``; a new tensor.

    What ``dtype`` represents exactly is never changed, so zeros, infinities and NaN stay. A finite value never
    becomes infinite: beyond the largest number of ``dtype`` it becomes that number. Between two neighbours the upper
    is taken with the probability that the mean asks for, in steps of 2^-16 (2^-13 of float16).

    Args:
        values: float32 ``[..., C]``; the noise of an element belongs to its row, counted over all axes but the
            last, and its column.
        dtype: bfloat16 or float16.
        key: from `noise_key`.

    Raises:
        ValueError: another dtype.
    """
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows = values.detach().reshape(-1, values.shape[-1]) if values.dim() else values.detach().reshape(1, 1)
    target = out.view(rows.shape)
    step = block_rows(rows)
    for begin in range(0, rows.shape[0], step):
        block = rows[begin : begin + step] * 1  # a copy, and every NaN a quiet one, whose mark is not in what is cut
        dither_into(target[begin : begin + step], block, key, begin)
    return out


def block_rows(rows: Tensor) -> int:
    """How many rows of ``rows [R, C]`` to take at a time: what fits a CPU's cache; on a GPU, few kernels."""
    return max(1, _BLOCK.get(rows.device.type, _BLOCK_ELSEWHERE) // max(1, rows.shape[1]))


def dither_into(out: Tensor, values: Tensor, key: int, first_row: int = 0) -> None:
    """Writes float32 ``values [R, C]`` into ``out [R, C]``, rounded as `dither` rounds rows from ``first_row`` on.

    ``values`` is contiguous, and is used up.

    Raises:
        ValueError: dtypes that are not float32 and bfloat16 or float16.
    """
    if values.dtype != torch.float32 or out.dtype not in DITHERED_DTYPES:
        raise ValueError(f"dithered rounding takes float32 to bfloat16 or float16, not {values.dtype} to {out.dtype}")
    kernel = _kernel() if out.dtype == torch.bfloat16 and values.device.type == "cpu" and _few_threads() else None
    if kernel is not None:
        bits, target = values.view(torch.int32).numpy(), out.view(torch.int16).numpy()
        kernel(bits.view("uint32"), target.view("uint16"), key, first_row)
    elif out.dtype == torch.bfloat16:
        _to_bfloat16(out, values, _noise(first_row, *values.shape, key, values.device))
    else:
        _to_float16(out, values, _noise(first_row, *values.shape, key, values.device))


def _few_threads() -> bool:
    return torch.get_num_threads() <= _KERNEL_THREADS


@lru_cache
def _kernel():
    try:
        from sparse_ft.lora.rounding_kernel import dither_bfloat16
    except ImportError:  # no numba here: torch's loops give the same bits
        return None
    return dither_bfloat16


def _signed(value: int) -> int:
    """The int32 with the low 32 bits of ``value``: torch multiplies and shifts no uint32."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _noise(first_row: int, rows: int, columns: int, key: int, device: torch.device) -> Tensor:
    """16 uniform bits for each element, as int32 ``[rows, columns]`` in 0..65535.

    Element (i, j) has half ``j & 1`` of the hash of ``i * ceil(columns / 2) + j // 2``: one hash serves two.
    """
    pairs = (columns + 1) // 2
    x = torch.arange(rows * pairs, dtype=torch.int32, device=device)
    x.add_(_signed(first_row * pairs)).bitwise_xor_(_signed(key))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(factor))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    halves = torch.stack((x & 0xFFFF, (x >> 16).bitwise_and_(0xFFFF)), dim=-1)
    return halves.view(rows, 2 * pairs)[:, :columns]


def _to_bfloat16(out: Tensor, values: Tensor, noise: Tensor) -> None:
    bits = values.view(torch.int32)
    # Without noise: what is not finite, and what would become so. The cut alone gives the largest number there.
    bits.add_(noise * (values.abs() < _LARGEST[torch.bfloat16]))
    out.view(torch.int16).copy_(bits >> 16)


def _to_float16(out: Tensor, values: Tensor, noise: Tensor) -> None:
    size, tiny = values.abs(), 2.0**-14
    # Below 2^-14 float16 counts in steps of 2^-24, as it does in the binade above: round there, and come back.
    lift = (size < tiny).float().mul_(tiny)
    lifted = size + lift
    lifted.view(torch.int32).add_((noise & 0x1FFF) * (size < _LARGEST[torch.float16])).bitwise_and_(~0x1FFF)
    lifted.sub_(lift)
    lifted = torch.where(size.isfinite(), lifted.clamp(max=_LARGEST[torch.float16]), lifted)
    out.copy_(lifted.copysign_(values))
