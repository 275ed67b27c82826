"""The masked linear map ``y = x ((W + s B A) . M)^T`` as one differentiable step, without stored products.

Pure tensors in, tensors out: nothing here knows PEFT, transformers or a model, so that it also runs where
those are absent or old.

Notation: ``W [out, in]`` frozen weight, ``A [r, in]`` and ``B [out, r]`` low-rank factors (Hu et al. 2021,
https://arxiv.org/abs/2106.09685), ``s`` their scaling, ``M`` the mask (True = kept), held as packed bits
``uint8 [out, ceil(in/8)]``, little-endian along the last axis. Every function also takes stacks of such
matrices (``W [E, out, in]`` and so on), which is how fused experts are stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_ft.lora.kernels import kernels_of
from sparse_ft.lora.rounding import DITHERED_DTYPES, block_rows, dither_into

__all__ = ["effective_weight", "masked_linear", "masked_weight", "prune_", "pruned_linear", "rank_one_factors"]

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16,
             torch.float16: torch.int16}  # fmt: skip
_CONTIGUOUS = torch.contiguous_format


def prune_(tensor: Tensor, packed: Tensor) -> Tensor:
    """Sets to +0.0, in place, every element of ``tensor [..., C]`` whose bit is 0; returns ``tensor``.

    Works on the bit patterns: a masked NaN or infinity becomes zero as well, and no -0.0 is left behind. Takes
    a few MB of memory on a CPU, one byte an element elsewhere, for the time of the call.

    Args:
        tensor: contiguous; float64, float32, bfloat16 or float16.
        packed: ``uint8 [..., ceil(C/8)]`` on the same device.

    Raises:
        ValueError: bits that do not fit the tensor, or another dtype.
    """
    columns = tensor.shape[-1]
    if packed.shape != (*tensor.shape[:-1], (columns + 7) // 8) or tensor.dtype not in _INTEGERS:
        raise ValueError(f"bits {tuple(packed.shape)} do not fit {tensor.dtype} {tuple(tensor.shape)}")
    if (kernels := kernels_of(tensor.device.type)) is not None:
        kernels.prune_into(tensor, tensor, packed.contiguous())
        return tensor
    rows, packed = tensor.view(_INTEGERS[tensor.dtype]).view(-1, columns), packed.reshape(-1, packed.shape[-1])
    # A CPU would widen int8 to the tensor's integers in a pass of its own, and likes blocks that fit its cache;
    # a GPU widens within the kernel and likes few kernels.
    if tensor.device.type == "cpu":
        _clear(rows, packed, rows.dtype, max(1, _BLOCK // max(1, columns)))
    else:
        _clear(rows, packed, torch.int8, max(1, rows.shape[0]))
    return tensor


def _pruned(tensor: Tensor, packed: Tensor) -> Tensor:
    """What `prune_` makes of ``tensor``, in a new one."""
    if (kernels := kernels_of(tensor.device.type)) is None:
        return prune_(tensor.clone(memory_format=_CONTIGUOUS), packed)
    out = torch.empty_like(tensor, memory_format=_CONTIGUOUS)
    kernels.prune_into(out, tensor.contiguous(), packed.contiguous())
    return out


def _clear(rows: Tensor, packed: Tensor, dtype: torch.dtype, step: int) -> None:
    """Clears the masked elements of integer ``rows [R, C]``, ``step`` rows at a time, with masks of ``dtype``."""
    table = _byte_table(dtype, packed.device)
    for begin in range(0, rows.shape[0], step):
        block, bits = rows[begin : begin + step], packed[begin : begin + step]
        keep = table[1].index_select(0, bits.reshape(-1).int()).view(table[0])
        block.bitwise_and_(keep.view(block.shape[0], -1)[:, : rows.shape[1]])


_BLOCK = 1 << 21  # elements


@lru_cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, Tensor]:
    """The integer ``dtype`` and ``int64 [256, itemsize]``: row b holds eight of them, all ones where bit k of b is set.

    One look-up a byte replaces eight shifts a byte: several times faster on a CPU.
    """
    with torch.inference_mode(False):
        bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
        return dtype, bits.neg().to(dtype).contiguous().view(torch.int64).to(device)


def effective_weight(
    weight: Tensor | None,
    factor_a: Tensor,
    factor_b: Tensor,
    packed: Tensor | None,
    scaling: float,
    key: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(W + s B A) . M`` in the dtype of ``W``: the one arithmetic of forward, backward and merge.

    With a key, and ``W`` in bfloat16 or float16, the sum is made in float32 and rounded by the key's noise: updates far
    below the weight's last bit survive in the mean. On a GPU one kernel does it, in an order of its own (see
    `sparse_ft.lora.fused`); elsewhere torch, a block of rows at a time. Otherwise it is made by one
    ``addmm`` (``baddbmm`` for stacks) of factors in the dtype of ``W``, and rounded once to the nearest. Adding a
    product that was rounded before gives another weight in bfloat16.

    Args:
        weight: ``W``; None stands for zero, the result then has the dtype of ``factor_a``.
        packed: bits of ``M``; None keeps everything.
        key: of `sparse_ft.lora.rounding.noise_key`; None rounds to the nearest.
        out: takes the result, in place of a new tensor; may be ``weight`` itself.
    """
    dtype = factor_a.dtype if weight is None else weight.dtype
    factor_a, factor_b = factor_a.detach(), factor_b.detach()
    with torch.no_grad(), torch.autocast(device_type=factor_a.device.type, enabled=False):
        if weight is not None and key is not None and dtype in DITHERED_DTYPES:
            return _dithered(weight.detach(), factor_a.float(), factor_b.float(), packed, scaling, key, out)
        factor_a, factor_b = factor_a.to(dtype), factor_b.to(dtype)
        if weight is None:
            result = torch.matmul(factor_b, factor_a).mul_(scaling)
        else:
            add = torch.addmm if weight.dim() == 2 else torch.baddbmm
            result = add(weight.detach(), factor_b, factor_a, alpha=scaling)
        result = result if packed is None else prune_(result, packed)
        return result if out is None else out.copy_(result)


def _dithered(
    weight: Tensor, factor_a: Tensor, factor_b: Tensor, packed: Tensor | None, scaling: float, key: int,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """`effective_weight` by dithered rounding; beside the result, memory for a block of rows."""
    kernels = kernels_of(weight.device.type)
    if kernels is not None and factor_a.shape[-2] <= kernels.LARGEST_RANK:
        result = out if out is not None and out.is_contiguous() else torch.empty_like(weight, memory_format=_CONTIGUOUS)
        packed = None if packed is None else packed.contiguous()
        kernels.effective_into(result, weight.contiguous(), factor_a, factor_b, packed, scaling, key)
        return result if out is None or out is result else out.copy_(result)
    out = torch.empty_like(weight, memory_format=_CONTIGUOUS) if out is None else out
    for index in range(1 if weight.dim() == 2 else weight.shape[0]):
        part = [tensor if tensor is None or weight.dim() == 2 else tensor[index]
                for tensor in (weight, factor_a, factor_b, packed, out)]  # fmt: skip
        base, a, b, bits, target = part
        step = block_rows(base)
        for begin in range(0, base.shape[0], step):
            rows = slice(begin, begin + step)
            total = base[rows].float().addmm_(b[rows], a, alpha=scaling)
            dither_into(target[rows], total, key, index * base.shape[0] + begin)
            if bits is not None:
                prune_(target[rows], bits[rows])
    return out


def masked_linear(
    x: Tensor,
    weight: Tensor | None,
    factor_a: Tensor,
    factor_b: Tensor,
    packed: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    key: int | None = None,
    keep: bool = False,
) -> Tensor:
    """``y = x ((W + s B A) . M)^T + bias``, differentiable in ``x``, ``A``, ``B`` and ``bias``.

    Keeps x, A, B and the bits for backward, and references to W; the effective weight is made again there, unless it is
    kept: the same bits either way.
    With T tokens, d = in = out: 6Td^2 + 8d^2 r floating point operations a step, against 4Td^2 + 12Tdr of
    LoRA on a frozen W.

    Args:
        x: ``[..., in]``.
        weight: ``W [out, in]``, a constant; None stands for zero (the adapter's part alone).
        packed: ``uint8 [out, ceil(in/8)]``.
        key: of the dithered rounding, see `effective_weight`; its gradient is taken as that of the sum.
        keep: whether the effective weight stays in memory until backward, where the gradient of ``x`` needs it.

    Returns:
        ``[..., out]`` in the dtype of ``x`` (of autocast, where that is on).
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return _MaskedLinear.apply(x, weight, factor_a, factor_b, packed, scaling, bias, key, keep)


def masked_weight(
    weight: Tensor, factor_a: Tensor, factor_b: Tensor, packed: Tensor, scaling: float, key: int | None = None
) -> Tensor:
    """`effective_weight`, differentiable in ``A`` and ``B``: for modules that use a weight in their own way.

    Keeps A, B and the bits for backward; the effective weight lives as long as its user keeps it.
    """
    return _MaskedWeight.apply(weight, factor_a, factor_b, packed, scaling, key)


def pruned_linear(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x (W . M)^T + bias`` of a frozen ``W`` that is not pruned itself, differentiable in ``x`` and ``bias``.

    Bit for bit what a linear map of the pruned weight gives, and its gradients. Keeps references to W and the bits for
    backward; ``W . M`` is made anew there.

    Args:
        x: ``[..., in]``.
        weight: ``W [out, in]``, contiguous, a constant.
        packed: ``uint8 [out, ceil(in/8)]``.
        bias: ``[out]``.

    Returns:
        ``[..., out]``.
    """
    return _PrunedLinear.apply(x, weight, packed, bias)


def rank_one_factors(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(m_out [out], m_in [in])``, boolean, with ``M = m_out m_in^T``, or None where there are none.

    Structured masks (whole rows and columns) have them; then ``(B A) . M = (m_out . B)(A . m_in)``.
    """
    rows, columns = mask.any(dim=1), mask.any(dim=0)
    return (rows, columns) if int(mask.sum()) == int(rows.sum()) * int(columns.sum()) else None


def _factor_gradients(
    gradient: Tensor, factor_a: Tensor, factor_b: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``dA = s B^T G``, ``dB = s G A^T`` for the masked weight gradient ``G``, in the factors' dtypes."""
    grad_a = grad_b = None
    if needs[0]:
        grad_a = torch.matmul(factor_b.to(gradient.dtype).mT, gradient).to(factor_a.dtype).mul_(scaling)
    if needs[1]:
        grad_b = torch.matmul(gradient, factor_a.to(gradient.dtype).mT).to(factor_b.dtype).mul_(scaling)
    return grad_a, grad_b


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, factor_a, factor_b, packed, scaling, bias, key, keep):
        effective = effective_weight(weight, factor_a, factor_b, packed, scaling, key).to(x.dtype)
        kept = effective if keep and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight, factor_a, factor_b, packed, kept)
        ctx.scaling, ctx.key = scaling, key
        return F.linear(x, effective, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, factor_a, factor_b, packed, effective = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            if effective is None:
                effective = effective_weight(weight, factor_a, factor_b, packed, ctx.scaling, ctx.key).to(grad.dtype)
            grad_x = torch.mm(grad, effective).view(x.shape)
            del effective  # if it was made here, the weight gradient below is as large: never hold both
        needs = (ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        if any(needs):
            gradient = prune_(torch.mm(grad.t(), x.reshape(-1, x.shape[-1])), packed)
            grad_a, grad_b = _factor_gradients(gradient, factor_a, factor_b, ctx.scaling, needs)
        if ctx.needs_input_grad[6]:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_a, grad_b, None, None, grad_bias, None, None


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, factor_a, factor_b, packed, scaling, key):
        ctx.save_for_backward(factor_a, factor_b, packed)
        ctx.scaling = scaling
        return effective_weight(weight, factor_a, factor_b, packed, scaling, key)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        factor_a, factor_b, packed = ctx.saved_tensors
        # Autograd may hand the same gradient to others: mask a copy.
        gradient = _pruned(gradient, packed)
        needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        return None, *_factor_gradients(gradient, factor_a, factor_b, ctx.scaling, needs), None, None, None


class _PrunedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, packed, bias):
        ctx.save_for_backward(weight, packed)
        return F.linear(x, _pruned(weight, packed), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        weight, packed = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, _pruned(weight, packed).to(grad.dtype))
            grad_x = grad_x.view(*grad_output.shape[:-1], weight.shape[-1])
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0)
        return grad_x, None, None, grad_bias
