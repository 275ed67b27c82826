"""Dithered rounding: what it never changes, that it keeps the mean, and that every path gives the same bits."""

import pytest
import torch

from sparse_ft.lora import rounding
from sparse_ft.lora.function import effective_weight
from sparse_ft.lora.rounding import dither, dither_into, noise_key
from sparse_ft.masks.mask_set import pack_bits

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 8), (5, 13), (2, 3, 17), (7, 1), (64, 96))


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def values(shape, seed=0):
    """Of every size, subnormal numbers included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-30, 15, shape, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_represents_is_never_changed(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    for key in (0, noise_key("w", 3)):
        rounded = dither(every.float(), dtype, key)
        known = ~every.isnan()
        assert torch.equal(bits(rounded)[known], bits(every)[known])  # -0.0, subnormal numbers and infinities too
        assert rounded[~known].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_becomes_one_of_its_neighbours_and_no_finite_one_becomes_infinite(dtype):
    largest = torch.finfo(dtype).max
    edge = torch.tensor([largest * 0.9999, largest * 1.0001, torch.finfo(torch.float32).max, 2.0**-40, 1e-45])
    exact = torch.cat((values((4096,)), edge, -edge)).view(1, -1)
    for seed in range(8):
        rounded = dither(exact, dtype, noise_key("w", seed))
        assert rounded.isfinite().all()
        inside = exact.abs() <= largest
        assert torch.equal(rounded.float()[~inside].abs(), torch.full((int((~inside).sum()),), largest))
        assert torch.equal(torch.signbit(rounded), torch.signbit(exact))
        nearest = exact.to(dtype)
        down = torch.nextafter(nearest, torch.tensor(-float("inf"), dtype=dtype))
        up = torch.nextafter(nearest, torch.tensor(float("inf"), dtype=dtype))
        neighbour = (rounded == nearest) | (rounded == down) | (rounded == up)
        assert neighbour[inside].all()


def test_signalling_nan_stays_nan():
    sly = torch.tensor([[0x7F800001, 0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    assert all(dither(sly, dtype, key).isnan().all() for dtype in DTYPES for key in range(8))


@pytest.mark.parametrize("part", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("dtype", "base", "unit"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.bfloat16, -3.0, -(2.0**-6)),
        (torch.float16, 1.0, 2.0**-10),
        (torch.float16, 5 * 2.0**-24, 2.0**-24),  # subnormal
    ],
)
def test_the_mean_is_kept(dtype, base, unit, part):
    exact = torch.full((500, 1000), base + part * unit)
    up = (dither(exact, dtype, noise_key("w")).float() - base) / unit
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert up.mean().item() == pytest.approx(part, abs=5 * (part * (1 - part) / up.numel()) ** 0.5)
    for axis in (0, 1):  # no row and no column is rounded one way
        line = up.mean(axis)
        assert line.std().item() == pytest.approx((part * (1 - part) / up.shape[axis]) ** 0.5, rel=0.2)
    neighbours = torch.corrcoef(torch.stack((up[:, ::2].flatten(), up[:, 1::2].flatten())))[0, 1]
    assert abs(neighbours) < 0.02  # the two halves of one hash


def test_names_and_seeds_have_noise_of_their_own():
    exact = torch.full((100, 100), 1 + 2.0**-8)
    keys = {noise_key(name, seed) for name in ("a", "b", "a.b") for seed in range(3)}
    assert len(keys) == 9 and noise_key("a", 1) == noise_key("a", 1)
    ups = [dither(exact, torch.bfloat16, key).float() > 1 for key in keys]
    for i, one in enumerate(ups):
        for other in ups[:i]:
            assert 0.45 < (one == other).float().mean() < 0.55


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_and_threads_and_the_compiled_loop_give_the_same_bits(dtype, shape, monkeypatch):
    exact, key = values(shape), noise_key("w", 5)
    exact.view(-1)[0] = float("nan")
    expected = dither(exact, dtype, key)
    monkeypatch.setitem(rounding._BLOCK, "cpu", 20)  # a row or two at a time
    assert torch.equal(bits(dither(exact, dtype, key)), bits(expected))
    monkeypatch.setattr(rounding, "_few_threads", lambda: False)  # torch's own loops, as on a GPU
    assert torch.equal(bits(dither(exact, dtype, key)), bits(expected))
    monkeypatch.undo()
    monkeypatch.setattr(rounding, "_few_threads", lambda: False)
    assert torch.equal(bits(dither(exact, dtype, key)), bits(expected))


def test_the_compiled_loop_is_what_a_cpu_runs_and_positions_may_wrap(monkeypatch):
    assert rounding._kernel() is not None
    exact, out = values((3, 10)), [torch.empty(3, 10, dtype=torch.bfloat16) for _ in range(2)]
    far = (1 << 32) // 5 - 1  # the pair's number passes 2^32 within the block
    dither_into(out[0], exact.clone(), 7, far)
    monkeypatch.setattr(rounding, "_few_threads", lambda: False)
    dither_into(out[1], exact.clone(), 7, far)
    assert torch.equal(bits(out[0]), bits(out[1]))
    assert not torch.equal(bits(out[0]), bits(dither(exact, torch.bfloat16, 7)))


def test_other_dtypes_are_refused_and_the_input_is_left_alone():
    exact = values((4, 4))
    before = exact.clone()
    dither(exact, torch.bfloat16, 1)
    assert torch.equal(exact, before)
    for source, target in ((torch.float64, torch.bfloat16), (torch.float32, torch.float32)):
        with pytest.raises(ValueError, match="float32 to bfloat16"):
            dither(exact.to(source), target, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [(), (3,)])
def test_effective_weight_is_the_dithered_sum_and_may_be_written_in_place(dtype, experts, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*experts, 24, 19, generator=generator).to(dtype)
    a, b = (torch.randn(*experts, *shape, generator=generator) * 0.03 for shape in ((4, 19), (24, 4)))
    mask = torch.rand(*experts, 24, 19, generator=generator) > 0.5
    packed, key = pack_bits(mask), noise_key("w", 2)
    exact = weight.float() + 0.5 * b @ a
    result = effective_weight(weight, a, b, packed, 0.5, key)
    expected = dither(exact, dtype, key) * mask
    assert (result != expected).float().mean() < 0.01  # the product's last bit, where experts are multiplied one by one
    assert torch.equal(result != 0, (expected != 0)) and not torch.signbit(result[~mask]).any()
    monkeypatch.setitem(rounding._BLOCK, "cpu", 40)
    target = weight.clone()
    assert effective_weight(target, a, b, packed, 0.5, key, out=target) is target
    assert (target != result).float().mean() < 0.01
    still = effective_weight(weight, a, torch.zeros_like(b), packed, 0.5, key)  # no update: every bit stays
    assert torch.equal(bits(still), bits(weight.masked_fill(~mask, 0)))


def test_small_updates_survive_in_the_mean_and_not_by_the_nearest():
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    a, b = torch.full((1, 256), 1.0), torch.full((256, 1), 2.0**-12)  # a thirty-second of the last place
    dithered = effective_weight(weight, a, b, None, 1.0, noise_key("w")).float() - 1
    assert dithered.mean().item() == pytest.approx(2.0**-12, rel=0.2)
    assert torch.equal(effective_weight(weight, a, b, None, 1.0), weight)
