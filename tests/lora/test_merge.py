"""Merging: in place, exact in every precision, rounded as asked, and refused where it would change something else."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_ft.errors import UserError
from sparse_ft.lora import (
    LoraSettings,
    SparseLoRAConfig,
    apply_sparse_lora,
    load_sparse_lora,
    merge_all_lora_weights,
    validate_sparsity_preserved,
)
from sparse_ft.lora.merge import adapted_layers
from sparse_ft.lora.rounding import dither, noise_key

SETTINGS = LoraSettings(lora_r=4, lora_alpha=8)
LOW = (torch.bfloat16, torch.float16)
name_of = {"ids": lambda d: str(d)[6:]}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
@pytest.mark.parametrize("method", ["unstructured", "structured"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", LOW, **name_of)
def test_trained_is_merged_and_reloaded_to_the_bit(dtype, kind, method, rounding, tiny, make_masks, work, tmp_path):
    base = tiny(kind, dtype)
    masks = make_masks(base, method)
    settings = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0 if kind == "mixtral" else 0.1, rounding=rounding)
    model = apply_sparse_lora(base, settings, "sparse_to_sparse", masks, seed=11)
    work.steps(model)
    trained = work.logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["rounding"], saved["rounding_seed"]) == (rounding, 11)
    again = load_sparse_lora(tiny(kind, dtype), tmp_path, masks)
    assert torch.equal(work.logits(again.eval()), trained)
    assert validate_sparsity_preserved(model, masks) == {}
    merged = merge_all_lora_weights(model)
    assert torch.equal(work.logits(merged), trained)
    assert validate_sparsity_preserved(merged, masks) == {}
    for (name, one), other in zip(weights(merged).items(), merge_all_lora_weights(again).parameters(), strict=True):
        assert torch.equal(one, other), name


def test_adapters_saved_before_there_was_a_choice_are_made_as_they_were(tiny, make_masks, work, tmp_path):
    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama", torch.bfloat16), SETTINGS, "sparse_to_sparse", masks)
    work.steps(model, lr=1e-3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("rounding")}))
    old = load_sparse_lora(tiny("llama", torch.bfloat16), tmp_path, masks)
    assert old.peft_config["default"].rounding == "nearest"
    for name, layer in list(adapted_layers(old)):
        weight, scaling = layer.get_base_layer().weight, layer.scaling["default"]
        a, b = (factor["default"].weight.bfloat16() for factor in (layer.lora_A, layer.lora_B))
        expected = torch.addmm(weight, b, a, alpha=scaling).masked_fill_(~masks[name], 0)  # the arithmetic of then
        assert torch.equal(layer.effective_weight("default"), expected)
    assert not torch.equal(work.logits(old.eval()), work.logits(model))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("mode", ["dense", "sparse_to_dense"])
@pytest.mark.parametrize("dtype", LOW, **name_of)
def test_dense_adapters_are_summed_in_float32_and_dithered(dtype, mode, kind, tiny, make_masks, work):
    masks = make_masks(tiny(kind)) if mode == "sparse_to_dense" else None
    model = apply_sparse_lora(tiny(kind, dtype), SETTINGS, mode, masks, seed=5)
    work.steps(model, lr=1e-4)
    expected = {}
    for name, layer in adapted_layers(model):
        weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")).detach()
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        assert a.dtype == torch.float32
        if weight.dim() == 3:
            a = a.view(weight.shape[0], -1, a.shape[-1])
            b = b.view(b.shape[0], -1, weight.shape[0]).permute(2, 0, 1)
        expected[name] = dither(weight.float() + layer.scaling["default"] * b @ a, dtype, noise_key(name, 5))
    before = weights(model.get_base_model())
    merged = merge_all_lora_weights(model, seed=5)
    for name, parameter in merged.named_parameters():
        if name in expected:
            assert (parameter != expected[name]).float().mean() < 1e-3, name  # the product's last bit may differ
        else:
            assert torch.equal(parameter, before[name])


def test_the_mean_update_survives_the_dithered_merge(tiny, work):
    torch.manual_seed(1)
    model = apply_sparse_lora(tiny("llama", torch.bfloat16), SETTINGS, "dense")
    for _, layer in adapted_layers(model):
        layer.lora_B["default"].weight.data.normal_(std=1e-4)
    update = {name: layer.get_delta_weight("default").detach().clone() for name, layer in adapted_layers(model)}
    before = {name: layer.get_base_layer().weight.detach().float().clone() for name, layer in adapted_layers(model)}
    merged = merge_all_lora_weights(model)
    moved = torch.cat([(merged.get_parameter(n).detach().float() - before[n]).flatten() for n in before])
    wanted = torch.cat([delta.flatten() for delta in update.values()])
    assert (moved @ wanted / (wanted @ wanted)).item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("mode", ["dense", "sparse_to_dense", "sparse_to_sparse"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **name_of)
def test_merging_writes_into_the_weights_and_keeps_nothing(dtype, kind, mode, tiny, make_masks, work):
    masks = None if mode == "dense" else make_masks(tiny(kind))
    model = apply_sparse_lora(tiny(kind, dtype), SETTINGS, mode, masks)
    work.steps(model, 1)
    layers = dict(adapted_layers(model))
    places = {name: parameter.data_ptr() for name, parameter in model.get_base_model().named_parameters()}
    merged = merge_all_lora_weights(model)
    after = {name: parameter.data_ptr() for name, parameter in merged.named_parameters()}
    plain = {name.replace(".base_layer", ""): place for name, place in places.items() if "lora_" not in name}
    assert after == plain
    assert not any(value for layer in layers.values() for value in getattr(layer, "_caches", {}).values())


def test_rounding_means_nothing_in_float32(tiny, make_masks, work):
    masks, made = make_masks(tiny("llama")), []
    for rounding in ("dithered", "nearest"):
        torch.manual_seed(0)
        settings = LoraSettings(lora_r=4, lora_alpha=8, rounding=rounding)
        model = apply_sparse_lora(tiny("llama"), settings, "sparse_to_sparse", masks, seed=len(made))
        work.steps(model)
        made.append(weights(merge_all_lora_weights(model)))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def tied(tiny):
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": r".*(q_proj|lm_head)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    ],
)
def test_an_adapter_on_a_shared_weight_is_refused(options, tiny):
    model = tied(tiny)
    before, trainable = weights(model), [p.requires_grad for p in model.parameters()]
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    with pytest.raises(UserError, match="shares its weight with") as refused:
        apply_sparse_lora(model, config, "dense")
    assert "\n" not in str(refused.value)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert weights(model).keys() == before.keys()


def test_an_adapter_on_a_head_of_its_own_is_merged_and_peft_s_on_a_shared_one_is_not(tiny, work):
    config = LoraConfig(r=2, target_modules=["lm_head", "embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    untied = tiny("llama")
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    model = apply_sparse_lora(untied, config, "dense")
    work.steps(model)
    trained = work.logits(model)
    torch.testing.assert_close(work.logits(merge_all_lora_weights(model)), trained, rtol=1e-3, atol=1e-3)

    model = get_peft_model(tied(tiny), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    work.steps(model)
    before = weights(model)
    with pytest.raises(UserError, match=r"lm_head shares its weight with model\.embed_tokens"):
        merge_all_lora_weights(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_unknown_rounding_is_one_line():
    with pytest.raises(UserError, match="rounding 'up' is none of dithered, nearest"):
        LoraSettings(rounding="up").check()
    for make in (SparseLoRAConfig, partial(merge_all_lora_weights, nn.Linear(2, 2))):
        with pytest.raises(UserError, match="rounding is 'up', it must be one of dithered, nearest"):
            make(rounding="up")
