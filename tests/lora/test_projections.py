"""What an adapter changes of a mixture: routed experts, shared ones and dense blocks, by one name."""

from dataclasses import replace

import pytest
import torch
from mixtures import MIXTURES

from sparse_ft.errors import UserError
from sparse_ft.lora import LoraSettings, apply_sparse_lora
from sparse_ft.lora.merge import adapted_layers, merge_all_lora_weights
from sparse_ft.lora.model import load_sparse_lora
from sparse_ft.models.loading import prunable_shapes, save_model
from sparse_ft.validation import validate_checkpoint

ALL = LoraSettings(lora_r=2, lora_alpha=4)


def learned(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


@pytest.mark.parametrize("mode", ["sparse_to_sparse", "dense"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_every_prunable_parameter_has_one_adapter(tiny, make_masks, kind, mode):
    model = tiny(kind.removeprefix("tiny-"))
    masks = make_masks(model) if mode == "sparse_to_sparse" else None
    expected = sorted(prunable_shapes(model, fused=True))
    adapted = apply_sparse_lora(model, ALL, mode, masks)
    layers = dict(adapted_layers(adapted))
    assert sorted(layers) == [name.removesuffix(".weight") + ".weight" * name.endswith(".weight") for name in expected]
    for name, layer in layers.items():
        parts = 2 if name.endswith("experts.gate_up_proj") else 1
        assert (layer.r["default"], layer.scaling["default"]) == (2 * parts, 2.0), name


@pytest.mark.parametrize("kind", ["tiny-llama", *MIXTURES])
def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank_that_was_asked_for(tiny, make_masks, kind):
    for mode in ("sparse_to_sparse", "dense"):
        model = tiny(kind.removeprefix("tiny-"))
        masks = make_masks(model) if mode == "sparse_to_sparse" else None
        settings = LoraSettings(lora_r=4, lora_alpha=6, rslora=True)
        layers = dict(adapted_layers(apply_sparse_lora(model, settings, mode, masks)))
        assert {round(layer.scaling["default"], 9) for layer in layers.values()} == {3.0}
        ranks = {name: layer.r["default"] for name, layer in layers.items()}
        assert {rank for name, rank in ranks.items() if name.endswith("experts.gate_up_proj")} <= {8}
        assert {rank for name, rank in ranks.items() if not name.endswith("experts.gate_up_proj")} == {4}


def test_a_name_means_all_maps_that_have_it(tiny, make_masks):
    model = tiny("qwen2_moe")
    masks = make_masks(model)
    settings = LoraSettings(lora_r=2, target_modules=("q_proj", "down_proj"))
    layers = sorted(name for name, _ in adapted_layers(apply_sparse_lora(model, settings, masks=masks)))
    mixture = ["mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight", "self_attn.q_proj.weight"]
    blocks = {0: mixture, 1: ["mlp.down_proj.weight", "self_attn.q_proj.weight"], 2: mixture}
    assert layers == [f"model.layers.{block}.{name}" for block, names in blocks.items() for name in names]
    with pytest.raises(UserError, match="gate_proj and up_proj together"):
        apply_sparse_lora(tiny("qwen2_moe"), LoraSettings(target_modules=("up_proj",)), masks=masks)
    with pytest.raises(UserError, match=r"target_modules gate: this model has down_proj"):
        apply_sparse_lora(tiny("qwen2_moe"), LoraSettings(target_modules=("gate",)), masks=masks)


@pytest.mark.parametrize(("kind", "rslora"), [*((kind, False) for kind in MIXTURES[1:]), ("tiny-mixtral", True)])
@torch.no_grad()
def test_what_was_trained_is_what_is_merged_and_what_is_loaded_again(tiny, make_masks, tmp_path, kind, rslora):
    family, ids = kind.removeprefix("tiny-"), torch.arange(3, 40)[None]
    masks = make_masks(tiny(family))
    model = learned(apply_sparse_lora(tiny(family, torch.bfloat16), replace(ALL, rslora=rslora), masks=masks, seed=3))
    trained = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = load_sparse_lora(tiny(family, torch.bfloat16), tmp_path / "adapter", masks)
    assert torch.equal(again(input_ids=ids).logits, trained)
    merged = merge_all_lora_weights(model)
    assert torch.equal(merged(input_ids=ids).logits, trained)
    save_model(merged, None, tmp_path / "merged")
    proof = validate_checkpoint(tmp_path / "merged", masks, base=tiny.folder(family))
    assert proof.ok, proof.problems
