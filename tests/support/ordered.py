"""The arithmetic of the kernel of effective weights, said in plain torch, one rounding an operation."""

import torch

from sparse_ft.lora.function import prune_
from sparse_ft.lora.rounding import dither


def effective(weight, factor_a, factor_b, packed, scaling, key):
    """``(W + s B A) . M``, dithered: the product summed in float32 in the order of the rank."""
    update = torch.zeros(weight.shape, device=weight.device)
    for k in range(factor_a.shape[-2]):
        update = update + factor_b[..., :, k : k + 1].float() * factor_a[..., k : k + 1, :].float()
    total = weight.float() + torch.tensor(scaling, device=weight.device) * update
    result = dither(total, weight.dtype, key)
    return result if packed is None else prune_(result, packed)


def problem(shape, dtype, rank=5, seed=1):
    """``W, A, B`` over many magnitudes, infinities, NaN and the largest numbers among them, and a mask."""
    g = torch.Generator().manual_seed(seed)
    *stack, rows, columns = shape
    exact = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-30, 4, shape, generator=g)
    weight = exact.to(dtype)
    odd = [float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0, 1e-7]
    flat = weight.view(-1)
    flat[: min(len(odd), flat.numel() // 2)] = torch.tensor(odd).to(dtype)[: flat.numel() // 2]
    a = torch.randn(*stack, rank, columns, generator=g)
    b = torch.randn(*stack, rows, rank, generator=g) * 2.0 ** torch.randint(-12, 1, (*stack, rows, rank), generator=g)
    return weight, a, b, torch.rand(shape, generator=g) >= 0.5


def same_bits(one, other):
    """Whether two tensors have the same bits; every NaN is one."""
    kind = torch.int16 if one.element_size() == 2 else torch.int32
    nan = one.isnan() & other.isnan()
    return torch.equal(one.view(kind).masked_fill(nan, 0), other.view(kind).masked_fill(nan, 0))
