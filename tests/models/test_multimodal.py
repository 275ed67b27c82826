"""A multimodal checkpoint is its text part: the same masks, checksums and numbers as of the text part alone."""

import json

import pytest
import torch
from adapters import adapted
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    Mistral3ForConditionalGeneration,
)

from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.models.families import ARCHITECTURES
from sparse_ft.models.loading import load_model, load_state_into, save_model
from sparse_ft.models.tiny import tiny_config
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.pruning.coverage import coverage_report
from sparse_ft.pruning.shrink import shrink_checkpoint
from sparse_ft.validation import validate_checkpoint

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CLASSES = {"gemma3": Gemma3ForConditionalGeneration, "mistral3": Mistral3ForConditionalGeneration}
MORE = {"gemma3": {"mm_tokens_per_image": 4}, "mistral3": {"spatial_merge_size": 1, "tie_word_embeddings": False}}
INSIDE = [(whole, text) for text, row in ARCHITECTURES.items() for whole in row.inside]
TEXT = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=INSIDE, ids="-".join)
def folders(request, tmp_path_factory):
    """A random multimodal model as transformers writes it, and its text part alone; the whole model."""
    whole, text = request.param
    home = tmp_path_factory.mktemp(whole)
    vision = VISION | ({"head_dim": 8} if whole == "mistral3" else {})
    text_config = tiny_config(f"tiny-{text}").to_dict()
    config = AutoConfig.for_model(whole, text_config=text_config, vision_config=vision, **MORE[whole])
    torch.manual_seed(3)
    model = CLASSES[whole](config).eval()
    model.save_pretrained(home / "whole")
    alone = AutoModelForCausalLM.from_config(config.get_text_config())
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    return home / "whole", save_model(alone, None, home / "alone"), model


def generate(folder, out, **how):
    generator = MaskGenerator(folder, PruningSettings(dtype="float32", **how), Calibration(TEXT, {"task": "noise"}))
    return generator.generate(out, figures="none")[0]


@torch.no_grad()
def logits(model):
    return model(input_ids=TEXT).logits


@pytest.mark.parametrize("how", [{}, {"method": "structured"}, {"importance": "wanda"}], ids=str)
def test_masks_and_checksums_are_those_of_the_text_part(folders, tmp_path, how):
    whole, alone, _ = folders
    assert Checkpoint(whole).fingerprint == Checkpoint(alone).fingerprint
    ours, theirs = generate(whole, tmp_path / "a", **how).load(), generate(alone, tmp_path / "b", **how).load()
    assert ours.checksum == theirs.checksum and next(iter(ours)).startswith("model.layers.0.")


def test_transformers_own_names_are_understood_too(folders, tmp_path):
    whole, alone, model = folders
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text((whole / "config.json").read_text())
    tensors = model.state_dict()
    if Checkpoint(whole).config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    assert any(name.startswith("model.language_model.layers.1.") for name in tensors)
    save_file(tensors, tmp_path / "own/model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(tmp_path / "own").fingerprint == Checkpoint(alone).fingerprint
    assert torch.equal(logits(load_model(tmp_path / "own", "float32", "cpu")), logits(model))


def test_the_text_part_says_what_the_whole_model_says(folders):
    whole, _, model = folders
    ours = load_model(whole, "float32", "cpu")
    assert torch.equal(logits(ours), logits(model))
    with torch.no_grad():
        ours.model.layers[0].mlp.up_proj.weight.zero_()
    load_state_into(ours, whole)
    assert torch.equal(logits(ours), logits(model))


def test_other_parts_are_carried_and_copied(folders, tmp_path):
    whole, _, model = folders
    checkpoint = Checkpoint(whole)
    assert any(name.startswith("vision_tower.") for name in checkpoint.carried)
    assert coverage_report(checkpoint)["tensors_carried"] == checkpoint.carried
    name = checkpoint.prunable[0]
    copied = copy_checkpoint(checkpoint, tmp_path / "copy", lambda n, tensor: tensor * (n != name))
    again = type(model).from_pretrained(copied)
    assert not Checkpoint(copied).tensor(name).any()
    for other, parameter in model.named_parameters():
        if not other.endswith(name.removeprefix("model.")):
            assert torch.equal(again.get_parameter(other), parameter)


def test_a_smaller_one_is_multimodal_still(folders, tmp_path):
    whole, _, model = folders
    masks = generate(whole, tmp_path / "masks", method="structured").load()
    small = shrink_checkpoint(whole, masks, tmp_path / "small")
    again, report = type(model).from_pretrained(small, output_loading_info=True)
    assert not any(report.values())
    before, after = model.config.text_config, again.config.text_config
    assert after.num_key_value_heads < before.num_key_value_heads and after.head_dim == before.head_dim
    ours = load_model(small, "float32", "cpu")
    torch.testing.assert_close(logits(again.eval()), logits(ours))
    assert torch.equal(again.state_dict()[next(n for n in again.state_dict() if "vision" in n)],
                       model.state_dict()[next(n for n in model.state_dict() if "vision" in n)])  # fmt: skip


def test_what_is_trained_is_saved_as_a_text_model(folders, tmp_path):
    whole, _, _ = folders
    masks = generate(whole, tmp_path / "masks").load()
    model = adapted(whole, masks)
    trained = logits(model)
    merged = save_model(merge_all_lora_weights(model), None, tmp_path / "merged")
    assert all(name.startswith(("model.", "lm_head.")) for name in load_file(merged / "model.safetensors"))
    assert json.loads((merged / "config.json").read_text())["model_type"] in ARCHITECTURES
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(plain), trained)
    assert validate_checkpoint(merged, masks, base=whole).ok
