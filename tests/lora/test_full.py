"""Full fine-tuning of a sparse model: masked weights, their gradients and their moments are exactly zero."""

import copy

import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.lora import apply_sparse_lora, merge_all_lora_weights, validate_sparsity_preserved
from sparse_ft.models.names import parameter_masks


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_masked_weights_and_their_moments_stay_zero(kind, dtype, tiny, make_masks, work):
    masks = make_masks(tiny(kind))
    model = apply_sparse_lora(tiny(kind, dtype), None, "full", masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    work.steps(model, 4, optimizer=optimizer)
    for name, mask in parameter_masks(model.config.to_dict(), masks).items():
        parameter = model.get_parameter(name)
        moments = optimizer.state[parameter]
        for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
            assert (tensor[~mask] == 0).all()
        assert (moments["exp_avg"][mask] != 0).float().mean() > 0.5
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())  # everything trained
    assert validate_sparsity_preserved(model, masks) == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    ],
    ids=["sgd", "adam-l2", "adamw-fused"],
)
def test_any_optimizer_and_accumulation_keep_the_zeros(make, tiny, make_masks, work):
    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama"), None, "full", masks).train()
    optimizer = make(model.parameters())
    for _ in range(2):
        for seed in range(2):
            model(**work.batch(seed)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert validate_sparsity_preserved(model, masks) == {}


def test_kept_weights_have_the_gradients_of_an_unmasked_sparse_model(tiny, make_masks, work):
    from sparse_ft.models.loading import apply_masks

    masks = make_masks(tiny("llama"))
    plain = tiny("llama")
    apply_masks(plain, masks)
    model = apply_sparse_lora(tiny("llama"), None, "full", masks)
    for each in (plain, model):
        each.train()(**work.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name).grad
        mask = masks[name] if name in masks else torch.ones_like(expected, dtype=torch.bool)
        assert torch.equal(parameter.grad, expected * mask)


def test_merging_takes_the_gradient_masks_off(tiny, make_masks, work):
    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama"), None, "full", masks)
    work.steps(model, 1)
    assert merge_all_lora_weights(model) is model and merge_all_lora_weights(model) is model
    model.train()(**work.batch()).loss.backward()
    name = next(iter(masks))
    assert (model.get_parameter(name).grad[~masks[name]] != 0).any()


def test_without_masks_it_is_plain_fine_tuning_and_foreign_masks_are_refused(tiny, make_masks, work):
    model = apply_sparse_lora(tiny("llama"), None, "full")
    assert all(p.requires_grad for p in model.parameters())
    work.steps(copy.deepcopy(model), 1)
    with pytest.raises(UserError, match="do not fit"):
        apply_sparse_lora(model, None, "full", make_masks(tiny("mistral")))
