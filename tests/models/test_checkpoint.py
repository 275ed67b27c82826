import json
import os
import shutil

import earlier
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.models.loading import load_model, load_state_into, save_model
from sparse_ft.pruning.structure import families
from sparse_ft.validation import validate_checkpoint


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("tiny-mistral"))


@pytest.fixture(params=["one file", "shards", "bfloat16"])
def folder(request, model, tmp_path):
    folder = tmp_path / "model"
    if request.param == "bfloat16":
        model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB" if request.param == "shards" else "1GB")
    return folder


def test_tensors_equal_what_safetensors_reads(folder):
    checkpoint = Checkpoint(folder)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert checkpoint.names == sorted(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert checkpoint.nbytes(name) == tensor.nbytes
        expected = tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
        assert np.array_equal(checkpoint.raw(name), expected)
        with open(checkpoint.shard(name), "rb") as file:
            file.seek(checkpoint.offset(name))
            assert file.read(tensor.nbytes) == expected.tobytes()


def test_several_shards_are_one_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert len(many.files) > 2
    assert (one.names, one.fingerprint) == (many.names, many.fingerprint)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
)
def test_the_fingerprint_sees_every_weight(folder, name, tmp_path):
    """One weight anywhere: a fine-tuned head, an edited embedding, a value in the middle of a matrix."""
    before = Checkpoint(folder)

    def change(own, tensor):
        flat = tensor.reshape(-1)
        if own == name:
            flat[flat.numel() // 3] += 1
        return tensor

    after = Checkpoint(copy_checkpoint(before, tmp_path / "after", change))
    assert before.fingerprint != after.fingerprint
    assert before.fingerprint == Checkpoint(copy_checkpoint(before, tmp_path / "same", lambda _, t: t)).fingerprint


def test_a_config_that_changes_in_place_is_read_again(folder, tmp_path):
    twin = shutil.copytree(folder, tmp_path / "twin")
    values, path = Checkpoint(folder).config, folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.25}))
    assert Checkpoint(folder).config == values | {"rms_norm_eps": 0.25}
    assert Checkpoint(twin).config == values
    Checkpoint(twin).config["rms_norm_eps"] = 7  # whoever changes what he was given changes nobody else's
    assert Checkpoint(twin).config == values


def test_weights_are_also_known_by_the_fingerprint_of_version_0_1_0(folder, tmp_path):
    one = Checkpoint(folder)
    other = Checkpoint(copy_checkpoint(one, tmp_path / "other", lambda name, t: -t if name in one.prunable else t))
    assert one.is_called(one.fingerprint) and one.is_called(earlier.fingerprint(one))
    assert not one.is_called(other.fingerprint) and not one.is_called(earlier.fingerprint(other))
    assert not one.is_called(None)


def test_a_copy_changes_what_it_is_told_to(folder, tmp_path):
    source = Checkpoint(folder)
    chosen = source.prunable[2]
    copy_checkpoint(source, tmp_path / "copy", lambda name, tensor: tensor * 0 if name == chosen else tensor)
    copy = Checkpoint(tmp_path / "copy")
    for name in source.names:
        expected = torch.zeros_like(source.tensor(name)) if name == chosen else source.tensor(name)
        assert torch.equal(copy.tensor(name), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").config.model_type == "mistral"


def test_a_copy_keeps_shapes_and_dtypes(folder, tmp_path):
    with pytest.raises(ValueError, match="instead of"):
        copy_checkpoint(Checkpoint(folder), tmp_path / "copy", lambda name, tensor: tensor.double())
    assert not (tmp_path / "copy").exists()


def test_what_is_no_checkpoint_is_a_clear_error(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model"):
        Checkpoint(tmp_path / "empty")
    file = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match="truncated"):
        Checkpoint(folder)


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        Checkpoint(tmp_path)


def test_a_name_that_only_the_index_has_is_noticed(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.lost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"layers\.9\.lost"):
        Checkpoint(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no config\.json"):
        _ = Checkpoint(tmp_path).config


# -- tensors that the model has no place for

CARRIED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(5.0),
    "model.layers.1.self_attn.k_scale": torch.tensor(0.5),
    "model.layers.1.self_attn.v_proj.output_scale": torch.tensor(float("nan")),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
    "model.layers.1.self_attn.bias": torch.ones(2, 2, dtype=torch.bool),
    "model.layers.1.self_attn.q_proj.bias": torch.ones(64),  # the configuration says that there are none
    "model.layers.2.input_layernorm.weight": torch.ones(52),  # one block more than the model has
    "position_ids": torch.arange(4),
    "kv.e4m3": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.zeros(2, dtype=torch.complex64),  # a type that is not read
}


@pytest.fixture
def burdened(tiny_model, tmp_path):
    """A tiny mistral with tensors that are none of the model's."""
    folder = shutil.copytree(tiny_model("tiny-mistral"), tmp_path / "burdened")
    save_file(load_file(folder / "model.safetensors") | CARRIED, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_the_model_has_no_place_for_is_carried(burdened, tiny_model, tmp_path):
    checkpoint, plain = Checkpoint(burdened), Checkpoint(tiny_model("tiny-mistral"))
    checkpoint.check()
    assert checkpoint.carried == sorted(CARRIED) and plain.carried == []
    assert (checkpoint.names, checkpoint.prunable) == (plain.names, plain.prunable)
    seen = []
    copy_checkpoint(checkpoint, tmp_path / "copy", lambda name, tensor: (seen.append(name), tensor * 0)[1])
    assert sorted(seen) == plain.names
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    for name, tensor in CARRIED.items():
        assert copy[name].dtype == tensor.dtype
        assert torch.equal(copy[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert not copy["model.norm.weight"].any()
    with pytest.raises(UserError, match="complex has the type C64"):
        checkpoint.tensor("complex")


def test_carried_tensors_are_not_restored_and_do_not_fail_validation(burdened, tiny_model):
    model = load_model(burdened, "float32", "cpu")
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    load_state_into(model, burdened)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    shapes = Checkpoint(burdened).prunable_shapes()
    masks = MaskSet.from_bool({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})
    plain = tiny_model("tiny-mistral")
    for folder, base in ((burdened, plain), (plain, burdened), (burdened, burdened)):
        assert validate_checkpoint(folder, masks, base=base).problems == []


# -- what config.json leaves to transformers


def test_values_that_config_json_leaves_out_are_those_of_transformers(tmp_path):
    config = MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    left = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rms_norm_eps")
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if k not in left}))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert "num_key_value_heads" not in checkpoint.stored_config
    assert checkpoint.config["num_key_value_heads"] == loaded.num_key_value_heads == 8
    assert checkpoint.config["tie_word_embeddings"] is loaded.tie_word_embeddings is False
    heads = [family.units for family in families(checkpoint.config, checkpoint.prunable_shapes())]
    assert 8 in heads


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": None}, "270 tensors are missing"),  # transformers' default is 32
        ({"num_hidden_layers": 3}, "9 tensors are missing"),
        ({"num_attention_heads": 5}, r"\[52, 80\]"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"num_hidden_layers": "two"}, "cannot read"),
        ({"model_type": "gpt2"}, "Models of type 'gpt2'"),
        ({"model_type": None}, "Models of type 'None'"),
        ({"intermediate_size": 100}, r"\[52, 100\]"),
        ({"vocab_size": 7}, r"\[7, 52\]"),
        ({"num_key_value_heads": None}, r"\[128, 52\]"),
    ],
)
def test_weights_and_a_configuration_that_do_not_fit_are_one_line(values, words, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("tiny-mistral"), tmp_path / "m")
    stored = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    for way in (lambda: Checkpoint(folder).check(), lambda: load_model(folder, "float32", "cpu")):
        with pytest.raises(UserError, match=words):
            way()


# -- quantised, or what is left of it

PLAIN_OF = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq"},
    {"quant_method": "fp8"},
    {"quant_method": "compressed-tensors", "format": "dense"},
    {"quant_method": "never-heard-of"},
    {},
]


@pytest.mark.parametrize("quantization", PLAIN_OF, ids=str)
def test_plain_weights_that_were_once_quantised_are_plain_weights(quantization, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("tiny-llama"), tmp_path / "m")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"quantization_config": quantization}))
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    assert checkpoint.fingerprint == Checkpoint(tiny_model("tiny-llama")).fingerprint
    model = load_model(folder, "float32", "cpu")
    written = [save_model(model, None, tmp_path / "saved")]
    written.append(copy_checkpoint(checkpoint, tmp_path / "copy", lambda name, tensor: tensor))
    for other in written:
        assert "quantization_config" not in json.loads((other / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(other)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"


def _instead(module, **tensors):
    def change(weights):
        del weights[f"{module}.weight"]
        return weights | {f"{module}.{name}": tensor for name, tensor in tensors.items()}

    return change


def _beside(module, **tensors):
    return lambda weights: weights | {f"{module}.{name}".replace("__", "."): t for name, t in tensors.items()}


def _cast(module, dtype):
    return lambda weights: weights | {f"{module}.weight": weights[f"{module}.weight"].to(dtype)}


LEFT = {
    "4 bits": (_instead(Q, weight=torch.zeros(1800, 1, dtype=torch.uint8)), "U8"),
    "8 bits": (_cast(Q, torch.int8), "I8"),
    "float8": (_cast(GATE, torch.float8_e4m3fn), "F8_E4M3"),
    "other float8": (_cast(GATE, torch.float8_e5m2), "F8_E5M2"),
    "complex": (_cast(GATE, torch.complex64), "C64"),
    "a head in 8 bits": (lambda w: w | {"model.embed_tokens.weight": torch.zeros(512, 60, dtype=torch.int8)}, "embed"),
    "packed by gptq": (_instead(Q, qweight=torch.zeros(8, 60, dtype=torch.int32)), "q_proj"),
    "packed floats": (_instead(Q, weight=torch.zeros(30, 60)), r"\[30, 60\]"),
    "a scale of its own": (_beside(Q, weight_scale=torch.ones(60, 1)), "weight_scale"),
    "an inverse scale": (_beside(Q, weight_scale_inv=torch.ones(1, 1)), "weight_scale_inv"),
    "int8 of bitsandbytes": (_beside(Q, SCB=torch.ones(60)), "SCB"),
    "4 bits of bitsandbytes": (_beside(Q, weight__absmax=torch.ones(60)), "absmax"),
}


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("case", LEFT)
def test_quantised_and_half_dequantised_weights_are_refused(case, configured, tiny_model, tmp_path):
    change, words = LEFT[case]
    folder = shutil.copytree(tiny_model("tiny-llama"), tmp_path / "m")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    if configured:
        stored = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "x"}}
        (folder / "config.json").write_text(json.dumps(stored))
    for way in (lambda: Checkpoint(folder).prunable, lambda: load_model(folder, "float32", "cpu")):
        with pytest.raises(UserError, match=words) as caught:
            way()
        assert ("quantization_config" in str(caught.value)) == configured
