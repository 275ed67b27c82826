"""Checkpoints as people have them: every family in every spelling, size and precision, through the same steps."""

import json
import math
import shutil

import pytest
import torch
from adapters import adapted
from blockwise import in_memory, rows_of_wanda
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparse_ft.errors import UserError
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import ARCHITECTURES
from sparse_ft.models.loading import apply_masks, load_model, save_model
from sparse_ft.models.tiny import tiny_config
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.pruning.shrink import shrink_checkpoint
from sparse_ft.validation import validate_checkpoint

TEXT = torch.randint(3, 500, (3, 24), generator=torch.Generator().manual_seed(5))
LAYERS = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}


def build(family, folder, words=None, **values):
    """A random model with some values of its configuration otherwise, and so many words in its vocabulary."""
    config = tiny_config(f"tiny-{family}").to_dict() | values
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    torch.manual_seed(3)
    attention = ARCHITECTURES[family].attention
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if words is not None:
        model.resize_token_embeddings(words, mean_resizing=False)
    return save_model(model, None, folder, max_shard_size="60KB" if words else "2GB")


def generate(folder, out, **how):
    generator = MaskGenerator(folder, PruningSettings(dtype="float32", **how), Calibration(TEXT, {"task": "noise"}))
    return generator.generate(out, figures="none")[0].load()


@torch.no_grad()
def logits(model):
    return model(input_ids=TEXT).logits


def goes_through(folder, tmp_path):
    """Loads as in transformers, is pruned as hooks say, shrinks, and merges what it was given."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(folder, "float32", "cpu")
    assert torch.equal(logits(model), logits(plain))
    masks = generate(folder, tmp_path / "wanda", importance="wanda", scope="row")
    _, oracle = in_memory(folder, TEXT, rows_of_wanda(0.5))
    for name in oracle:
        assert (masks[name] == oracle[name]).float().mean() > 0.995, name
    structured = generate(folder, tmp_path / "structured", method="structured")
    small = shrink_checkpoint(folder, structured, tmp_path / "small")
    apply_masks(model, structured)
    smaller = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(smaller), logits(model), rtol=5e-3, atol=5e-3)
    before, after = (sum(map(math.prod, Checkpoint(f).prunable_shapes().values())) for f in (folder, small))
    assert after < 0.75 * before
    model = adapted(folder, masks)
    trained = logits(model)
    merged = save_model(merge_all_lora_weights(model), None, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(again), trained)
    assert validate_checkpoint(merged, masks, base=folder).ok


def as_transformers_4(config):
    """The same configuration in the words of transformers 4."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    if "full_attention" in rope:  # a table for each kind of attention
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    else:
        old["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type", "default")
        old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = old.pop("dtype")
    return old


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_all_at_once(family, tmp_path):
    """Old spellings, a larger vocabulary, the head tied where it was not, shards, float32 norms among bfloat16 weights,
    and tensors that the model has no place for."""
    row, tied = ARCHITECTURES[family], tiny_config(f"tiny-{family}").tie_word_embeddings
    folder = build(family, tmp_path / "odd", words=531, tie_word_embeddings=not tied)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and (row.head_weight in Checkpoint(folder).names) is tied
    for number, shard in enumerate(shards):
        tensors = load_file(shard)
        tensors = {name: t if "norm" in name else t.to(torch.bfloat16) for name, t in tensors.items()}
        if number == 0:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
        save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shards[0].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = as_transformers_4(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(folder, "float32", "cpu")), logits(plain))
    assert Checkpoint(folder).carried == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    goes_through(folder, tmp_path)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.2, 2.3],
        "original_max_position_embeddings": 512,
    },
    "proportional": {"rope_type": "proportional", "factor": 4.0, "partial_rotary_factor": 0.5},
}


def test_every_kind_of_rope_that_transformers_has_is_tried():
    assert ROPES.keys() == ROPE_INIT_FUNCTIONS.keys()


@pytest.mark.parametrize(
    ("family", "kind"), zip(["qwen2", "olmo2", "granite", "qwen2", "granite", "qwen2"], ROPES, strict=True)
)
def test_every_kind_of_rope(family, kind, tmp_path):
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    goes_through(build(family, tmp_path / "model", rope_parameters=rope), tmp_path)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        # windows
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, **LAYERS}),
        ("qwen3", {"use_sliding_window": True, **LAYERS}),
        ("smollm3", {"use_sliding_window": True, **LAYERS}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
        ("phi3", {"sliding_window": 8}),
        # rotary embeddings of a part of a head, and of tables for short and long texts
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("phi3", {"rope_parameters": {"rope_theta": 10000.0, **ROPES["longrope"]}}),
        ("gemma3_text", {"rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
        }}),
        # biases
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True}),
        ("granite", {"attention_bias": True, "mlp_bias": False}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}),
        ("cohere", {"attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
        ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
        ("ernie4_5", {"use_bias": False}),
        ("glm4", {"attention_bias": False}),
        # norms that are there or not, and blocks that are built otherwise
        ("cohere", {"use_qk_norm": False}),
        ("stablelm", {"qk_layernorm": False, "use_qkv_bias": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
        # heads: each with keys of its own, all with the same
        ("qwen3", {"num_key_value_heads": 6}),
        ("qwen3", {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}),
        ("llama", {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}),
        ("phi3", {"num_key_value_heads": 6}),
        ("olmo2", {"num_key_value_heads": 6}),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_of_a_family(family, values, tmp_path):
    goes_through(build(family, tmp_path / "model", **values), tmp_path)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_what_cannot_be_pruned_is_one_line(family, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model(f"tiny-{family}"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    name = Checkpoint(folder).prunable[0]

    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            MaskGenerator(folder, PruningSettings()).generate(tmp_path / "masks", figures="none")
        assert "\n" not in str(caught.value) and not (tmp_path / "masks").exists()

    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    scaled = tensors | {f"{name}_scale_inv": torch.ones(1)}
    save_file(scaled | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    refused("is quantised .*method fp8")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused("holds an adapter beside its weights")
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    refused("restore the index")
