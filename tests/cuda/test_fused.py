"""The kernels on a GPU against plain torch, to the bit, and effective weights that are kept where there is room."""

import pytest
import torch

from sparse_ft.lora import LoraSettings, apply_sparse_lora, function, fused, merge_all_lora_weights
from sparse_ft.lora.function import effective_weight, masked_linear, prune_
from sparse_ft.lora.keeping import Keeping, kept_bytes, set_keeping
from sparse_ft.lora.kernels import kernels_of, made_by
from sparse_ft.lora.rounding import noise_key
from sparse_ft.masks.mask_set import MaskSet, pack_bits
from sparse_ft.memory import reset_peak
from sparse_ft.models.loading import load_model, prunable_shapes
from tests.support.ordered import effective, problem, same_bits

LOW = (torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (5, 13), (3, 7, 17), (512, 1024), (129, 4104))


@pytest.fixture
def by_torch(monkeypatch):
    """Inside, plain torch does the kernels' work."""

    def begin():
        monkeypatch.setattr(function, "kernels_of", lambda kind: None)

    return begin


def test_the_kernels_do_the_work_here():
    assert kernels_of("cuda") is fused and made_by(torch.device("cuda")).startswith("triton ")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_a_weight_has_the_bits_of_plain_torch_here_and_on_a_cpu(dtype, shape, rank):
    weight, a, b, mask = problem(shape, dtype, rank)
    key = noise_key("w")
    for packed in (None, pack_bits(mask)):
        terms = [None if term is None else term.cuda() for term in (weight, a, b, packed)]
        found = effective_weight(*terms, 0.37, key)
        assert same_bits(found, effective(*terms, 0.37, key))
        assert same_bits(found.cpu(), effective(weight, a, b, packed, 0.37, key))
        assert same_bits(effective_weight(*terms, 0.37, key, out=terms[0]), found)  # in place, as merge writes it


def test_a_rank_above_the_kernels_own_is_torchs():
    weight, a, b, mask = problem((64, 80), torch.bfloat16, fused.LARGEST_RANK + 1)
    weight = weight.nan_to_num(0, 0, 0).clamp(-2, 2)
    found = effective_weight(weight.cuda(), a.cuda(), b.cuda(), pack_bits(mask).cuda(), 0.5, 3).cpu()
    exact = (weight.double() + 0.5 * b.double() @ a.double()) * mask
    assert (found.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_elements_are_those_of_plain_torch(dtype, shape, by_torch):
    values, mask = torch.randn(shape, device="cuda").to(dtype), torch.rand(shape) >= 0.5
    packed = pack_bits(mask).cuda()
    found = prune_(values.clone(), packed)
    by_torch()
    assert torch.equal(found, prune_(values.clone(), packed)) and not torch.signbit(found.cpu()[~mask]).any()


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_under_the_kernels_are_those_under_plain_torch(dtype, by_torch):
    weight, a, b, mask = (value.cuda() for value in problem((96, 200), torch.bfloat16, 8))
    weight, packed, x = (
        weight.nan_to_num(0, 0, 0).clamp(-2, 2).to(dtype),
        pack_bits(mask.cpu()).cuda(),
        torch.randn(64, 200).cuda(),
    )

    def gradients(keep):
        leaves = [x.to(dtype).requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        masked_linear(leaves[0], weight, *leaves[1:], packed, 0.5, None, 7, keep).float().square().mean().backward()
        return [leaf.grad.float() for leaf in leaves]

    remade, kept = gradients(False), gradients(True)
    assert all(torch.equal(one, other) for one, other in zip(remade, kept, strict=True))
    by_torch()
    for one, other in zip(kept, gradients(False), strict=True):
        assert (one - other).norm() / other.norm() < 0.02  # sums in another order, rounded to 8 bits


def adapted(tiny_model, name, keep):
    model = load_model(tiny_model(name), torch.bfloat16, "cuda")
    if name == "tiny-mixtral":
        model.set_experts_implementation("eager")  # the grouped kernel takes no rows of a tiny model
    g = torch.Generator().manual_seed(0)
    masks = MaskSet.from_bool({n: torch.rand(s, generator=g) >= 0.5 for n, s in prunable_shapes(model).items()}, {})
    torch.manual_seed(0)
    return apply_sparse_lora(model, LoraSettings(lora_r=4, keep_effective=keep), "sparse_to_sparse", masks)


def steps(model, count):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(count):
        ids = torch.randint(3, 500, (4, 33), generator=torch.Generator().manual_seed(step)).cuda()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mixtral"])
@pytest.mark.parametrize("keep", ["always", "never"])
def test_the_merged_model_is_the_trained_one_to_the_bit(tiny_model, name, keep):
    model = adapted(tiny_model, name, keep)
    steps(model, 3)
    ids = torch.randint(3, 500, (2, 17), generator=torch.Generator().manual_seed(9)).cuda()
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        merged = merge_all_lora_weights(model)(input_ids=ids).logits
    assert torch.equal(trained, merged)


@pytest.mark.parametrize("room", [True, False])
def test_auto_asks_the_card_what_is_free(tiny_model, memory_limit, room):
    model, lines = adapted(tiny_model, "tiny-llama", "auto"), []
    reset_peak("cuda")
    decision = Keeping(model, torch.device("cuda"), lines.append)
    steps(model, 1)
    if not room:  # enough for a batch, and for a part of what would be kept
        memory_limit(torch.cuda.max_memory_allocated() + kept_bytes(model) // 2)
    decision.after_batch()
    assert decision.chosen == ("kept" if room else "made again"), lines


def test_kept_weights_take_what_is_counted(tiny_model):
    model, peaks = adapted(tiny_model, "tiny-llama", "never"), {}
    model.enable_input_require_grads()
    steps(model, 1)
    for keep in ("never", "always"):
        set_keeping(model, keep)
        reset_peak("cuda")
        steps(model, 1)
        peaks[keep] = torch.cuda.max_memory_allocated()
    assert 0.5 * kept_bytes(model) < peaks["always"] - peaks["never"] <= 1.05 * kept_bytes(model)
