"""A family is a row: the one that CONTRIBUTING.md adds is added here, and used throughout."""

import pytest
import torch
from documents import FENCE, section
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_ft.errors import UserError
from sparse_ft.lora import LoraSettings
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import apply_sparse_lora
from sparse_ft.models import families
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model, save_model
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.pruning.shrink import shrink_checkpoint
from sparse_ft.validation import validate_checkpoint


def row():
    """The row that the page adds."""
    (body,) = (body for _, body in FENCE.findall(section("CONTRIBUTING.md", "How to add an architecture")))
    names = dict(vars(families))
    exec(body, names)
    return names["STARCODER2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Starcoder2 as transformers writes it."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("starcoder2", initializer_range=0.2, **sizes, **heads, **tokens)
    return save_model(AutoModelForCausalLM.from_config(config), None, tmp_path_factory.mktemp("starcoder2") / "model")


@pytest.fixture
def starcoder2(folder, monkeypatch):
    monkeypatch.setitem(families.ARCHITECTURES, "starcoder2", row())
    return folder


def generate(folder, out, text=None, **how):
    calibration = None if text is None else Calibration(text)
    return MaskGenerator(folder, PruningSettings(**how), calibration).generate(out, figures=False)[0]


def test_without_its_row_a_family_is_refused(folder):
    with pytest.raises(UserError, match="'starcoder2' are not supported") as caught:
        MaskGenerator(folder, PruningSettings())
    said = str(caught.value)
    assert "\n" not in said and "CONTRIBUTING.md says how to add one" in said
    assert all(f" {family}" in said for family in families.ARCHITECTURES) and " gemma3," in said


def test_magnitude_masks_cover_every_linear_map_of_the_blocks(starcoder2, tmp_path):
    masks = generate(starcoder2, tmp_path, sparsities=(0.5,)).load()
    model = load_model(starcoder2, "float32", "cpu")
    maps = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name}
    assert set(masks) == {f"{name}.weight" for name in maps} and len(maps) == 12
    for name, module in maps.items():
        weight, mask = module.weight.abs(), masks[f"{name}.weight"]
        assert int((~mask).sum()) == weight.numel() // 2
        assert weight[~mask].max() <= weight[mask].min()


@pytest.mark.parametrize("importance", ["wanda", "sparsegpt", "alps"])
def test_rules_that_read_text_run_block_by_block(starcoder2, tmp_path, importance):
    text = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    made = generate(starcoder2, tmp_path, text, importance=importance)
    assert made.pruned == round(made.weights / 2)
    if importance != "wanda":
        assert validate_checkpoint(made.checkpoint, made.load()).ok


@torch.no_grad()
def test_heads_and_channels_go_together(starcoder2, tmp_path):
    masks = generate(starcoder2, tmp_path, method="structured").load()
    small = shrink_checkpoint(starcoder2, masks, tmp_path / "small")
    shapes = {name: shape for name, shape in Checkpoint(small).prunable_shapes().items() if ".0." in name}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (2 * 16, 48)
    assert shapes["model.layers.0.mlp.c_fc.weight"] == shapes["model.layers.0.mlp.c_proj.weight"][::-1]
    assert shapes["model.layers.0.mlp.c_fc.weight"][0] < 72
    model, ids = load_model(starcoder2, "float32", "cpu"), torch.arange(20)[None]
    apply_masks(model, masks)
    ours = load_model(small, "float32", "cpu")(input_ids=ids).logits
    torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sparse_adapter_merges_to_the_bit(starcoder2, tmp_path):
    masks = generate(starcoder2, tmp_path, sparsities=(0.7,)).load()
    model = apply_sparse_lora(load_model(starcoder2, "bfloat16", "cpu"), LoraSettings(lora_r=2), masks=masks)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    ids = torch.arange(20)[None]
    trained = model(input_ids=ids).logits
    merged = save_model(merge_all_lora_weights(model), None, tmp_path / "merged")
    assert torch.equal(load_model(merged, "bfloat16", "cpu")(input_ids=ids).logits, trained)
    assert validate_checkpoint(merged, masks, base=starcoder2).ok
