"""The kernels as Triton's interpreter runs them, on a CPU; `test_fused.py` starts this in a process of its own."""

import pytest
import torch

from sparse_ft.lora import LoraSettings, apply_sparse_lora, function, fused, merge_all_lora_weights
from sparse_ft.lora.rounding import noise_key
from sparse_ft.masks.mask_set import pack_bits, unpack_bits
from tests.support.ordered import effective, problem, same_bits

LOW = (torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (5, 13), (3, 7, 17), (17, 256), (33, 300))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_has_the_bits_of_plain_torch(dtype, shape):
    weight, a, b, mask = problem(shape, dtype)
    for key in (0, 0xF0000001, noise_key("w")):
        for packed in (None, pack_bits(mask)):
            found = torch.empty_like(weight)
            fused.effective_into(found, weight, a, b, packed, 0.37, key)
            assert same_bits(found, effective(weight, a, b, packed, 0.37, key))
    assert not found[~mask].any() and not torch.signbit(found[~mask]).any()


@pytest.mark.parametrize("dtype", LOW)
def test_a_weight_may_be_written_in_place_and_factors_be_views(dtype):
    weight, a, b, mask = problem((2, 19, 40), dtype)
    packed, views = pack_bits(mask), (a.mT.contiguous().mT, b.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    expected = effective(weight, a, b, packed, 2.0, 9)
    fused.effective_into(weight, weight, *views, packed, 2.0, 9)
    assert same_bits(weight, expected)


def test_an_update_of_zero_leaves_every_bit_and_a_small_one_survives_in_the_mean():
    weight = torch.ones(32, 256, dtype=torch.bfloat16)
    a, b, found = torch.ones(1, 256), torch.zeros(32, 1), torch.empty_like(weight)
    fused.effective_into(found, weight, a, b, None, 1.0, 3)
    assert torch.equal(found, weight)
    fused.effective_into(found, weight, a, b + 2.0**-10, None, 1.0, 3)
    assert (found.float() - 1).mean().item() == pytest.approx(2.0**-10, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_elements_become_zero_and_others_stay(dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) >= 0.5
    values.view(-1)[0] = float("nan")
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
    out = torch.full_like(values, 7)
    fused.prune_into(out, values, pack_bits(mask))
    assert torch.equal(out.nan_to_num(), expected.nan_to_num()) and not torch.signbit(out[~mask]).any()
    fused.prune_into(values, values, pack_bits(mask))
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


def test_what_lies_apart_in_memory_is_refused_and_what_is_empty_is_nothing():
    apart = torch.ones(4, 6, dtype=torch.bfloat16).t()
    with pytest.raises(ValueError, match="not contiguous"):
        fused.prune_into(apart, apart, torch.zeros(6, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not contiguous"):
        fused.effective_into(apart, apart, torch.ones(1, 4), torch.ones(6, 1), None, 1.0, 0)
    empty = torch.ones(0, 6)
    fused.prune_into(empty, empty, torch.zeros(0, 1, dtype=torch.uint8))
    fused.try_out("cpu")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_model_that_was_trained_with_the_kernels_is_merged_to_its_bits(kind, tiny, make_masks, work, monkeypatch):
    masks, losses = make_masks(tiny(kind)), {}
    for kernels in (None, fused):
        monkeypatch.setattr(function, "kernels_of", lambda device, kernels=kernels: kernels)
        torch.manual_seed(0)
        model = apply_sparse_lora(tiny(kind, torch.bfloat16), LoraSettings(lora_r=2), "sparse_to_sparse", masks)
        losses[kernels] = work.steps(model, 2, lr=1e-3)
        trained = work.logits(model)
    merged = merge_all_lora_weights(model)
    assert (work.logits(merged) - trained).abs().max() == 0
    assert losses[fused] == pytest.approx(losses[None], rel=1e-2)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    kept = unpack_bits(masks.packed["model.layers.0.self_attn.q_proj.weight"], weight.shape[1])
    assert weight[kept].count_nonzero() > 0.9 * kept.sum() and not weight[~kept].any()
