"""Effective weights and masked gradients on a GPU, each in one pass over memory: kernels in Triton.

A CUDA build of torch brings Triton along. Imported only where a GPU is used; see `sparse_ft.lora.function`.

The kernel sums the product itself, in float32 and in the order of the rank, and rounds after each operation: no matrix
library, tensor core or fused multiply-add has a say, so that its bits are those of IEEE arithmetic, on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LARGEST_RANK", "effective_into", "prune_into", "try_out"]

LARGEST_RANK = 64  # above, the product is worth a matrix library and its passes over memory
_ROWS, _COLUMNS = 16, 256  # of a tile
_UNSPECIALISED = ["scaling", "key", "rank"]  # else there would be kernels for keys that 16 divides


def effective_into(
    out: Tensor, weight: Tensor, factor_a: Tensor, factor_b: Tensor, packed: Tensor | None, scaling: float, key: int
) -> None:
    """Writes ``(W + s B A) . M``, rounded by the noise of ``key`` (`sparse_ft.lora.rounding.dither`), into ``out``.

    Reads W and the bits once and writes once: 4.1 bytes an element.

    Args:
        out: bfloat16 or float16 ``[..., out, in]``, contiguous; may be ``weight``.
        weight: ``W``, of the same shape and dtype, contiguous.
        factor_a: ``A [..., r, in]``, r up to `LARGEST_RANK`; of any strides.
        factor_b: ``B [..., out, r]``, likewise.
        packed: ``uint8 [..., out, ceil(in/8)]``, contiguous; None keeps everything.
        scaling: ``s``, rounded to float32.
        key: 32 bits.

    Raises:
        ValueError: tensors that are not contiguous.
    """
    _check(out, weight, out if packed is None else packed)
    rows, columns = out.shape[-2:]
    stack_a, stack_b = (factor if factor.dim() == 3 else factor.unsqueeze(0) for factor in (factor_a, factor_b))
    tiles = triton.cdiv(rows, _ROWS)
    if not out.numel():
        return
    with torch.cuda.device_of(out):
        _effective[(len(stack_a) * tiles, triton.cdiv(columns, _COLUMNS))](
            out.view(torch.int16), weight.view(torch.int16), stack_a, stack_b, out if packed is None else packed,
            rows, columns, tiles, *stack_a.stride(), *stack_b.stride(),
            float(scaling), _signed(key), stack_a.shape[1],
            MASKED=packed is not None, BFLOAT16=out.dtype == torch.bfloat16, ROWS=_ROWS, COLUMNS=_COLUMNS,
            enable_fp_fusion=False,
        )  # fmt: skip


def prune_into(out: Tensor, tensor: Tensor, packed: Tensor) -> None:
    """Writes ``tensor`` into ``out``, +0.0 where the bit is 0; ``out`` may be ``tensor``.

    Args:
        out: contiguous ``[..., C]``, of integers or floats.
        tensor: the same.
        packed: ``uint8 [..., ceil(C/8)]``, contiguous.

    Raises:
        ValueError: tensors that are not contiguous.
    """
    _check(out, tensor, packed)
    columns = out.shape[-1]
    rows, kind = out.numel() // max(1, columns), _INTEGERS[out.element_size()]
    if not out.numel():
        return
    with torch.cuda.device_of(out):
        _prune[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
            out.view(kind), tensor.view(kind), packed, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS
        )


def try_out(device: str) -> None:
    """Makes a weight whose exact value is known, so that what does not work here fails now and not in a training.

    Raises:
        RuntimeError: a wrong value; beside it whatever Triton says where it cannot compile or start a kernel.
    """
    kept = torch.tensor([[0b101]], dtype=torch.uint8, device=device)
    ones = torch.ones(1, 3, dtype=torch.bfloat16, device=device)
    effective_into(ones, ones, torch.ones(2, 3, device=device), torch.ones(1, 2, device=device), kept, 0.25, 1)
    prune_into(ones, ones, kept)
    if ones.tolist() != [[1.5, 0.0, 1.5]]:
        raise RuntimeError(f"a kernel gives {ones.tolist()}, not [[1.5, 0.0, 1.5]]")


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _check(*tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"not contiguous: one of {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


@triton.jit
def _kept(bits_ptr, row, column, columns, inside):
    """Whether the bit of each element is 1."""
    place = row.to(tl.int64) * ((columns + 7) // 8) + (column >> 3)
    return (tl.load(bits_ptr + place, mask=inside, other=0).to(tl.int32) >> (column & 7)) & 1


@triton.jit
def _prune(out_ptr, in_ptr, bits_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column
    kept = inside & (_kept(bits_ptr, row, column, columns, inside) != 0)
    tl.store(out_ptr + place, tl.load(in_ptr + place, mask=kept, other=0), mask=inside)


@triton.jit
def _noise(row, column, columns, key):
    """16 bits an element, as `sparse_ft.lora.rounding` makes them: half of a hash that two neighbours share."""
    pairs = ((columns + 1) // 2).to(tl.uint32)
    x = (row.to(tl.uint32) * pairs + (column >> 1).to(tl.uint32)) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return tl.where((column & 1) != 0, x >> 16, x & 0xFFFF)


@triton.jit
def _to_bfloat16(total, noise):
    bits = total.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7FFFFFFF) < 0x7F7F0000  # below the largest number: the cut alone gives that one
    return (tl.where(finite, bits + noise, bits) >> 16).to(tl.int16)


@triton.jit
def _to_float16(total, noise):
    size = tl.abs(total)
    # Below 2^-14 float16 counts in steps of 2^-24, as it does in the binade above: round there, and come back.
    lift = tl.where(size < 6.103515625e-05, 6.103515625e-05, 0.0)
    bits = (size + lift).to(tl.uint32, bitcast=True)
    bits = tl.where(size < 65504.0, bits + (noise & 0x1FFF), bits) & 0xFFFFE000
    lifted = bits.to(tl.float32, bitcast=True) - lift
    # The sign last, as a bit: of NaN and zero too. What is finite stays so.
    lifted = tl.where((size < float("inf")) & (lifted > 65504.0), 65504.0, lifted)
    sign = (total.to(tl.uint32, bitcast=True) >> 16) & 0x8000
    return (lifted.to(tl.float16).to(tl.uint16, bitcast=True) | sign.to(tl.uint16)).to(tl.int16)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _effective(
    out_ptr, weight_ptr, a_ptr, b_ptr, bits_ptr,
    rows, columns, tiles, a_stack, a_rank, a_column, b_stack, b_row, b_rank,
    scaling, key, rank,
    MASKED: tl.constexpr, BFLOAT16: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    stack = tl.program_id(0) // tiles
    own = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)[:, None]  # rows of this matrix of the stack
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (own < rows) & (column < columns)
    a_place = a_ptr + stack.to(tl.int64) * a_stack + column.to(tl.int64) * a_column
    b_place = b_ptr + stack.to(tl.int64) * b_stack + own.to(tl.int64) * b_row
    update = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(rank):
        a = tl.load(a_place + k * a_rank, mask=column < columns, other=0.0).to(tl.float32)
        b = tl.load(b_place + k * b_rank, mask=own < rows, other=0.0).to(tl.float32)
        update = update + b * a
    row = stack * rows + own
    place = row.to(tl.int64) * columns + column
    bits = tl.load(weight_ptr + place, mask=inside, other=0)
    if BFLOAT16:
        weight = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        weight = bits.to(tl.float16, bitcast=True).to(tl.float32)
    total = weight + scaling * update
    noise = _noise(row, column, columns, key)
    if BFLOAT16:
        rounded = _to_bfloat16(total, noise)
    else:
        rounded = _to_float16(total, noise)
    if MASKED:
        rounded = tl.where(_kept(bits_ptr, row, column, columns, inside) != 0, rounded, 0)
    tl.store(out_ptr + place, rounded, mask=inside)
