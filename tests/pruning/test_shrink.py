import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model, save_model
from sparse_ft.models.tiny import tiny_config
from sparse_ft.progress import Progress
from sparse_ft.pruning import MaskGenerator, PruningSettings
from sparse_ft.pruning.shrink import kept_units, shrink_checkpoint
from sparse_ft.pruning.structure import families


def structured(folder, out, *levels, **how):
    settings = PruningSettings(method="structured", sparsities=levels, **how)
    return [result.load() for result in MaskGenerator(folder, settings).generate(out, figures="none")]


@torch.no_grad()
def logits(folder, text, masks=None):
    model = load_model(folder, "float32", "cpu")
    if masks is not None:
        apply_masks(model, masks)
    return model(input_ids=text).logits, model.config


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mistral", "tiny-mixtral"])
def test_a_smaller_model_says_what_the_masked_one_says(tiny_model, text, tmp_path, kind):
    folder = tiny_model(kind)
    for level, masks in zip((0.2, 0.5, 0.8), structured(folder, tmp_path, 0.2, 0.5, 0.8), strict=True):
        small = shrink_checkpoint(folder, masks, tmp_path / f"small{level}")
        ours, config = logits(small, text)
        torch.testing.assert_close(ours, logits(folder, text, masks)[0], rtol=1e-4, atol=1e-4)
        before = Checkpoint(folder).config
        assert config.intermediate_size < before["intermediate_size"]
        left = sum(int(torch.Size(shape).numel()) for shape in Checkpoint(small).prunable_shapes().values())
        assert left == masks.n_weights - masks.n_pruned


class Told(Progress):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    ("family", "values", "written"),
    [
        # 40 is no multiple of 6 heads, and one of 4 and 8
        ("llama", {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}, {0.2: 8, 0.5: 8, 0.7: 4}),
        ("gemma2", {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}, {0.2: 8, 0.5: 8, 0.7: 4}),
        # models that have as many heads as fill their hidden size
        ("stablelm", {}, {0.1: 6, 0.5: 6, 0.8: 6}),
        ("olmoe", {}, {0.1: 6, 0.5: 6, 0.8: 6}),
    ],
)
def test_heads_that_transformers_cannot_do_without_stay_as_zeros(family, values, written, text, tmp_path):
    """The next number of heads that there is, in which those that masks remove give out nothing."""
    config = AutoConfig.for_model(**(tiny_config(f"tiny-{family}").to_dict() | values))
    torch.manual_seed(3)
    folder = save_model(AutoModelForCausalLM.from_config(config), None, tmp_path / "model")
    shapes, said = Checkpoint(folder).prunable_shapes(), []
    members = [f for f in families(Checkpoint(folder).config, shapes) if f.kind == "attention"]
    for (level, heads), masks in zip(written.items(), structured(folder, tmp_path, *written), strict=True):
        told = Told()
        small = Checkpoint(shrink_checkpoint(folder, masks, tmp_path / f"small{level}", told))
        kept = int(kept_units(members[0], masks).sum()) * (config.num_attention_heads // members[0].units)
        assert small.config["num_attention_heads"] == heads >= kept
        ours, theirs = logits(small.folder, text)[0], logits(folder, text, masks)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        name = "model.layers.0.self_attn.o_proj.weight"
        by_head = small.tensor(name).view(small.shape(name)[0], heads, -1)
        assert int(by_head.any(2).any(0).sum()) == kept
        line = f"shrink: {kept} of {config.num_attention_heads} heads are kept, and transformers has no {family} model"
        assert told.lines == [] if kept == heads else told.lines[0].startswith(line)
        said += told.lines
    assert said


def fused(folder, target):
    """The same Mixtral with the experts of a block in two 3-D tensors."""
    source, tensors = Checkpoint(folder), {}
    for name in source.names:
        if ".experts." not in name:
            tensors[name] = source.tensor(name)
    for block in range(source.config["num_hidden_layers"]):
        prefix = f"model.layers.{block}.block_sparse_moe.experts"
        experts = range(source.config["num_local_experts"])
        weight = {w: [source.tensor(f"{prefix}.{e}.{w}.weight") for e in experts] for w in ("w1", "w2", "w3")}
        pairs = zip(weight["w1"], weight["w3"], strict=True)
        home = f"model.layers.{block}.mlp.experts"
        tensors[f"{home}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{home}.down_proj"] = torch.stack(weight["w2"])
    target.mkdir()
    (target / "config.json").write_text(json.dumps(source.config))
    save_file(tensors, target / "model.safetensors")
    return target


def test_both_namings_of_experts_are_pruned_alike(tiny_model, tmp_path, text):
    single = tiny_model("tiny-mixtral")
    whole = fused(single, tmp_path / "fused")
    (one,), (other,) = structured(single, tmp_path / "a", 0.5), structured(whole, tmp_path / "b", 0.5)
    assert one.checksum == other.checksum
    small = shrink_checkpoint(whole, other, tmp_path / "small")
    shapes = Checkpoint(small).prunable_shapes()
    assert shapes["model.layers.0.block_sparse_moe.experts.3.w2.weight"] == (40, 24)
    torch.testing.assert_close(logits(small, text)[0], logits(single, text, one)[0], rtol=1e-4, atol=1e-4)


def test_shards_and_their_index_stay(write_llama, tmp_path):
    folder, _ = write_llama(shards=3)
    (masks,) = structured(folder, tmp_path / "masks", 0.5)
    small = Checkpoint(shrink_checkpoint(folder, masks, tmp_path / "small"))
    assert [file.name for file in small.files] == [file.name for file in Checkpoint(folder).files]
    sizes = sum(sum(t.numel() * 2 for t in load_file(file).values()) for file in small.files)
    assert json.loads((small.folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sizes


def test_what_cannot_be_a_plain_checkpoint_is_refused(tiny_model, tmp_path):
    folder = tiny_model("tiny-llama")
    shapes = Checkpoint(folder).prunable_shapes()
    unstructured = {name: torch.rand(shape) > 0.5 for name, shape in shapes.items()}
    with pytest.raises(UserError, match="not structured"):
        shrink_checkpoint(folder, MaskSet.from_bool(unstructured), tmp_path / "x")
    (everything,) = structured(folder, tmp_path, 1.0)
    with pytest.raises(UserError, match="leave no"):
        shrink_checkpoint(folder, everything, tmp_path / "x")
    (half,) = structured(folder, tmp_path, 0.5)
    uneven = {name: half[name] for name in half}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{projection}.weight"
        uneven[name] = torch.ones_like(uneven[name])
    with pytest.raises(UserError, match=r"between 74 and 148 MLP channels"):
        shrink_checkpoint(folder, MaskSet.from_bool(uneven), tmp_path / "x")
    with pytest.raises(UserError, match="do not fit"):
        shrink_checkpoint(tiny_model("tiny-mistral"), half, tmp_path / "x")
    assert not (tmp_path / "x").exists()
