import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint, copy_checkpoint


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
