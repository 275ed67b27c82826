"""One copy of the weights for the pruned model under its adapter and, the masks lifted, for the dense one."""

import copy

import pytest
import torch
from torch import nn

from sparse_ft.lora import LoraSettings, apply_sparse_lora, merge_all_lora_weights, validate_sparsity_preserved
from sparse_ft.lora.function import prune_, pruned_linear
from sparse_ft.lora.whole import WholeLinear, whole_base
from sparse_ft.masks.mask_set import pack_bits
from sparse_ft.models.checkpoint import Checkpoint

TWO = ("q_proj", "v_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_whole_weight_under_its_mask_gives_what_the_pruned_one_gives(dtype, bias):
    pruned = nn.Linear(37, 24, bias=bias, dtype=dtype)
    weight, packed = pruned.weight.detach().clone(), pack_bits(torch.rand(24, 37) > 0.5)
    prune_(pruned.weight.data, packed)
    x, gradient = torch.randn(2, 5, 37, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = pruned(first), pruned_linear(second, weight, packed, pruned.bias)
    assert torch.equal(found, expected)
    expected.backward(gradient)
    found.backward(gradient)
    assert torch.equal(second.grad, first.grad)


def student(tiny, make_masks, kind, mode, dtype=torch.float32, method="unstructured", **settings):
    dense = tiny(kind, dtype)
    masks = make_masks(dense, method)
    settings = LoraSettings(lora_r=2, lora_alpha=8, **settings)
    model = apply_sparse_lora(copy.deepcopy(dense), settings, mode, masks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return dense, model, masks, Checkpoint(tiny.folder(kind))


@pytest.mark.parametrize(
    ("kind", "mode", "dtype", "settings"),
    [
        ("llama", "sparse_to_sparse", torch.float32, {}),
        ("llama", "sparse_to_sparse", torch.bfloat16, {}),
        ("llama", "sparse_to_sparse", torch.float32, {"target_modules": TWO}),
        ("llama", "sparse_to_sparse", torch.bfloat16, {"lora_dropout": 0.5}),
        ("llama", "sparse_to_sparse", torch.float32, {"method": "structured"}),
        ("llama", "sparse_to_dense", torch.bfloat16, {"target_modules": TWO}),
        ("qwen2", "sparse_to_dense", torch.float32, {}),
        ("mixtral", "sparse_to_sparse", torch.float32, {}),
        ("qwen2_moe", "sparse_to_sparse", torch.float32, {}),
    ],
)
def test_lifted_it_is_the_dense_model_and_trained_it_is_the_pruned_one(
    tiny, make_masks, work, kind, mode, dtype, settings
):
    dense, pruned, masks, folder = student(tiny, make_masks, kind, mode, dtype, **settings)
    expected, whole = work.logits(dense), copy.deepcopy(pruned)
    own = sum(parameter.numel() for parameter in whole.parameters())
    losses = _steps(pruned, work)
    with whole_base(whole, masks, folder) as teacher:
        assert torch.equal(work.logits(teacher), expected)
        # The teacher's pass comes between the student's two, as in distillation.
        assert _steps(whole, work, lambda: work.logits(teacher)) == losses
        assert torch.equal(work.logits(teacher), expected)
        assert torch.equal(work.logits(whole), work.logits(pruned))
        assert sum(parameter.numel() for parameter in whole.parameters()) == own  # no second copy
    assert not any(isinstance(module, WholeLinear) for module in whole.modules())
    for (name, one), (_, other) in zip(pruned.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    if mode == "sparse_to_sparse":
        assert not validate_sparsity_preserved(merge_all_lora_weights(whole), masks)


def _steps(model, work, between=lambda: None):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(2):
        loss = model.train()(**work.batch(step)).loss
        between()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_experts_beside_a_dense_adapter_are_left_pruned(tiny, make_masks, work):
    _, model, masks, folder = student(tiny, make_masks, "mixtral", "sparse_to_dense")
    before = work.logits(model)
    with whole_base(model, masks, folder) as teacher:
        assert teacher is None and torch.equal(work.logits(model), before)
