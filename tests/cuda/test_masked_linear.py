"""The masked linear map on a GPU against double precision on a CPU, and its zeros, to the bit."""

import pytest
import torch

from sparse_ft.lora.function import effective_weight, masked_linear, prune_
from sparse_ft.lora.rounding import dither, noise_key
from sparse_ft.masks.mask_set import pack_bits

OUT, IN, RANK, TOKENS = 96, 203, 8, 64  # rows that are no whole number of bytes


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(*shape, generator=g) for shape in ((OUT, IN), (RANK, IN), (OUT, RANK)))
    mask = torch.rand(OUT, IN, generator=g) >= 0.5
    return torch.randn(TOKENS, IN, generator=g), weight, a, b, mask, torch.randn(TOKENS, OUT, generator=g)


# Sums of 203 products: float32 rounds at 6e-8 of a term, bfloat16 at 4e-3.
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_values_and_gradients_are_those_of_double_precision(dtype, close):
    x, weight, a, b, mask, gradient = problem()
    x, weight, gradient = x.to(dtype), weight.to(dtype), gradient.to(dtype)
    exact = [value.double().requires_grad_() for value in (x, a, b)]
    wanted = exact[0] @ ((weight.double() + 0.5 * exact[2] @ exact[1]) * mask).T
    wanted.backward(gradient.double())

    ours = [value.cuda().requires_grad_() for value in (x, a, b)]
    found = masked_linear(ours[0], weight.cuda(), ours[1], ours[2], pack_bits(mask).cuda(), 0.5)
    found.backward(gradient.cuda())
    pairs = [(found.detach(), wanted.detach()), *((o.grad, e.grad) for o, e in zip(ours, exact, strict=True))]
    for got, expected in pairs:
        assert got.isfinite().all()
        assert (got.double().cpu() - expected).norm() / expected.norm() < close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_zeros_are_exact_and_the_rest_untouched(dtype, experts):
    g = torch.Generator().manual_seed(1)
    values = torch.randn(*experts, OUT, IN, generator=g).to(dtype)
    mask = torch.rand(values.shape, generator=g) >= 0.7
    packed = pack_bits(mask).cuda()
    cleared = prune_(values.cuda(), packed).cpu()
    assert torch.equal(cleared, torch.where(mask, values, torch.zeros((), dtype=dtype)))
    assert not torch.signbit(cleared[~mask]).any()
    a, b = torch.randn(*experts, RANK, IN, generator=g).cuda(), torch.randn(*experts, OUT, RANK, generator=g).cuda()
    merged = effective_weight(values.cuda(), a, b, packed, 2.0)
    assert not merged.cpu()[~mask].any()
    assert torch.equal(merged, effective_weight(values.cuda(), a, b, packed, 2.0))  # the merge's bits are repeatable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (2, 3, 17), (OUT, IN)])
def test_dithered_rounding_has_the_bits_of_a_cpu(dtype, shape):
    g = torch.Generator().manual_seed(2)
    exact = torch.randn(shape, generator=g) * 2.0 ** torch.randint(-30, 15, shape, generator=g)
    exact.view(-1)[0] = float("inf")
    for seed in range(3):
        key = noise_key("w", seed)
        here, there = dither(exact, dtype, key), dither(exact.cuda(), dtype, key).cpu()
        assert torch.equal(here.view(torch.int16), there.view(torch.int16))


def test_a_dithered_merge_is_repeatable_and_small_updates_survive():
    weight = torch.ones(OUT, IN, dtype=torch.bfloat16, device="cuda")
    a, b = torch.ones(1, IN, device="cuda"), torch.full((OUT, 1), 2.0**-10, device="cuda")
    merged = effective_weight(weight, a, b, None, 1.0, noise_key("w"))
    assert torch.equal(merged, effective_weight(weight, a, b, None, 1.0, noise_key("w")))
    assert (merged.float().mean() - 1).item() == pytest.approx(2.0**-10, rel=0.3)
