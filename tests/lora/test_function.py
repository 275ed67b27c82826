"""The masked linear map against plain torch: values, gradients, memory kept, precision."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from sparse_ft.lora.function import (
    _clear,
    effective_weight,
    masked_linear,
    masked_weight,
    prune_,
    rank_one_factors,
)
from sparse_ft.masks.mask_set import pack_bits, unpack_bits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def problem(out=6, inner=11, r=2, experts=(), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(*experts, out, inner, generator=g, dtype=torch.float64)
    a = torch.randn(*experts, r, inner, generator=g, dtype=torch.float64)
    b = torch.randn(*experts, out, r, generator=g, dtype=torch.float64)
    mask = torch.rand(*experts, out, inner, generator=g) >= 0.5
    return weight.to(dtype), a.to(dtype), b.to(dtype), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8), (5, 13), (4, 1), (2, 3, 17)])
def test_prune_zeroes_exactly_the_masked(dtype, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) >= 0.5
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    tensor = values.clone()
    assert prune_(tensor, pack_bits(mask)) is tensor
    assert torch.equal(tensor, torch.where(mask, values, torch.zeros((), dtype=dtype)))
    assert not torch.signbit(tensor[~mask]).any()  # +0.0, also where the weight was negative


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_the_way_of_a_gpu_is_the_way_of_a_cpu(dtype):
    rows = torch.randint(-(1 << 14), 1 << 14, (9, 21)).to(dtype)
    packed = pack_bits(torch.rand(9, 21) > 0.5)
    expected = rows * unpack_bits(packed, 21)
    for widened, step in ((dtype, 2), (torch.int8, 9)):
        cleared = rows.clone()
        _clear(cleared, packed, widened, step)
        assert torch.equal(cleared, expected)


def test_prune_cleans_nan_and_infinity_and_refuses_what_does_not_fit():
    tensor = torch.tensor([[float("nan"), float("inf"), 1.0, float("nan")]])
    prune_(tensor, pack_bits(torch.tensor([[False, False, True, True]])))
    assert tensor[0, :3].tolist() == [0.0, 0.0, 1.0] and tensor[0, 3].isnan()
    with pytest.raises(ValueError, match="do not fit"):
        prune_(torch.zeros(2, 9), torch.zeros(2, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="int64"):
        prune_(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.uint8))


def test_prune_under_inference_mode_leaves_nothing_behind_that_training_cannot_use():
    from sparse_ft.lora.function import _byte_table

    _byte_table.cache_clear()
    weight, a, b, mask = problem(dtype=torch.float32)
    with torch.inference_mode():
        effective_weight(weight, a, b, pack_bits(mask), 1.0)
    a.requires_grad_()
    masked_linear(torch.randn(3, 11), weight, a, b, pack_bits(mask), 1.0).sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize("experts", [(), (3,)])
def test_effective_weight_is_the_formula(experts):
    weight, a, b, mask = problem(experts=experts)
    expected = (weight + 0.7 * b @ a) * mask
    torch.testing.assert_close(effective_weight(weight, a, b, pack_bits(mask), 0.7), expected, rtol=1e-14, atol=1e-14)
    expected = 0.7 * (b @ a) * mask
    torch.testing.assert_close(effective_weight(None, a, b, pack_bits(mask), 0.7), expected, rtol=1e-14, atol=1e-14)


def test_effective_weight_is_rounded_once_in_bfloat16():
    """The sum of an exact product, rounded; adding the rounded product would differ in many weights."""
    weight, a, b, mask = problem(64, 64, 8, dtype=torch.bfloat16)
    result = effective_weight(weight, a, b, pack_bits(mask), 0.5)
    exact = (weight.double() + 0.5 * (b.double() @ a.double())) * mask
    twice = weight + (0.5 * (b.double() @ a.double())).bfloat16()
    assert torch.equal(result, exact.bfloat16())
    assert ((twice * mask) != exact.bfloat16()).sum() > 100


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_gradcheck_of_the_linear_map(bias, base):
    weight, a, b, mask = problem()
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    a.requires_grad_(), b.requires_grad_()
    offset = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None

    def run(x, a, b, offset):
        return masked_linear(x, weight if base else None, a, b, pack_bits(mask), 0.7, offset)

    assert torch.autograd.gradcheck(run, (x, a, b, offset))


@pytest.mark.parametrize("experts", [(), (3,)])
def test_gradcheck_of_the_weight(experts):
    weight, a, b, mask = problem(experts=experts)
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: masked_weight(weight, a, b, pack_bits(mask), 0.7), (a, b))


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_each_subset_of_gradients_equals_autograd_of_the_formula(wanted):
    weight, a, b, mask = problem(dtype=torch.float32)
    x = torch.randn(4, 11)

    def gradients(run):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, a, b), wanted, strict=True)]
        run(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients(lambda x, a, b: masked_linear(x, weight, a, b, pack_bits(mask), 0.7))
    plain = gradients(lambda x, a, b: F.linear(x, (weight + 0.7 * b @ a) * mask))
    for one, other, want in zip(ours, plain, wanted, strict=True):
        assert (one is not None) == want
        if want:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_backward_keeps_no_product_of_the_factors():
    """Saved for backward: x, references to W, A and B, and the bits. Nothing of the weight's size is new."""
    weight, a, b, mask = problem(64, 96, 4, dtype=torch.float32)
    packed, x = pack_bits(mask), torch.randn(8, 96, requires_grad=True)
    a.requires_grad_(), b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear(x, weight, a, b, packed, 1.0)
    known = {t.data_ptr() for t in (x, weight, a, b, packed)}
    assert {t.data_ptr() for t in saved} == known


def test_the_callers_gradient_is_left_alone():
    weight, a, b, mask = problem(dtype=torch.float32)
    a.requires_grad_()
    gradient = torch.ones(6, 11)
    masked_weight(weight, a, b, pack_bits(mask), 1.0).backward(gradient)
    assert torch.equal(gradient, torch.ones(6, 11))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_computes_with_the_rounded_merged_weight(base):
    weight, a, b, mask = problem(32, 48, 4, dtype=torch.float32)
    weight, packed, x = weight.to(base), pack_bits(mask), torch.randn(5, 48)
    a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, a, b, packed, 0.5)
        merged = F.linear(x, effective_weight(weight, a, b, packed, 0.5))
    assert y.dtype == torch.bfloat16 and torch.equal(y, merged)
    y.float().sum().backward()
    assert a.grad.dtype == torch.float32 and a.grad.abs().sum() > 0


def test_gradients_reach_fp32_factors_of_a_bf16_weight():
    weight, a, b, mask = problem(32, 48, 4, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    x = torch.randn(16, 48)
    masked_linear(x.bfloat16(), weight.bfloat16(), *leaves, pack_bits(mask), 0.5).float().square().sum().backward()
    exact = [t.clone().requires_grad_() for t in (a, b)]
    F.linear(x, (weight + 0.5 * exact[1] @ exact[0]) * mask).square().sum().backward()
    for ours, other in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - other.grad).norm() / other.grad.norm() < 0.02  # bfloat16 has 8 bits


def test_rank_one_masks_are_recognised_and_others_are_not():
    rows, columns = torch.tensor([True, False, True]), torch.tensor([True, True, False, True])
    factors = rank_one_factors(torch.outer(rows, columns))
    assert torch.equal(factors[0], rows) and torch.equal(factors[1], columns)
    assert rank_one_factors(torch.ones(3, 4, dtype=torch.bool)) is not None
    nothing = rank_one_factors(torch.zeros(3, 4, dtype=torch.bool))
    assert not torch.outer(*nothing).any()
    mask = torch.outer(rows, columns)
    mask[0, 0] = False
    assert rank_one_factors(mask) is None
    assert rank_one_factors(torch.eye(3, dtype=torch.bool)) is None
