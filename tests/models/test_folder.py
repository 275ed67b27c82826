"""One definition of a folder's weights: what transformers loads from it is what is read, and the rest is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft.errors import UserError
from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.validation import validate_checkpoint

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    """A tiny model in one file."""
    return shutil.copytree(locate("tiny-mistral"), tmp_path / "m")


@pytest.fixture
def shards(tmp_path):
    """The same in shards."""
    model = AutoModelForCausalLM.from_pretrained(locate("tiny-mistral"))
    model.save_pretrained(tmp_path / "s", max_shard_size="60KB")
    return tmp_path / "s"


def changed(folder, name, value, file="model.safetensors"):
    """Writes a copy of the weights under another file name, with the final norm at ``value``."""
    tensors = load_file(folder / file)
    tensors[NORM] = torch.full_like(tensors[NORM], value)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def whole_beside_shards(folder, shards):
    changed(folder, "model.safetensors", 3.0)
    shutil.copy(folder / "model.safetensors", shards)
    return shards


def an_index_of_nothing_beside_the_whole(folder, shards):
    shutil.copy(shards / INDEX, folder)
    return folder


def a_damaged_index_beside_the_whole(folder, shards):
    (folder / INDEX).write_text("{")
    return folder


def stray_files(folder, shards):
    changed(folder, "model_old.safetensors", 3.0)
    changed(folder, "model-00001-of-00002.safetensors", 4.0)
    changed(folder, "model.fp16.safetensors", 5.0)
    return folder


def a_stray_shard(folder, shards):
    changed(folder, "model-00099-of-00099.safetensors", 3.0)
    shutil.copy(folder / "model-00099-of-00099.safetensors", shards)
    return shards


def an_index_that_names_the_wrong_shard(folder, shards):
    first = sorted(shards.glob("*.safetensors"))[0].name
    edit(shards / INDEX, lambda content: content["weight_map"].update({NORM: first}))
    return shards


def a_tensor_in_two_shards(folder, shards):
    other = {NORM: torch.full_like(Checkpoint(shards).tensor(NORM), 3.0)}
    save_file(other, shards / "zz.safetensors", metadata={"format": "pt"})
    edit(shards / INDEX, lambda content: content["weight_map"].update({NORM: "zz.safetensors"}))
    return shards


def a_name_in_the_config(folder, shards):
    changed(folder, "other.safetensors", 3.0)
    edit(folder / "config.json", lambda content: content.update(transformers_weights="other.safetensors"))
    return folder


FOLLOWED = [
    whole_beside_shards, an_index_of_nothing_beside_the_whole, a_damaged_index_beside_the_whole, stray_files,
    a_stray_shard, an_index_that_names_the_wrong_shard, a_tensor_in_two_shards, a_name_in_the_config,
]  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_is_read_is_what_transformers_loads(case, folder, shards):
    which = case(folder, shards)
    truth = AutoModelForCausalLM.from_pretrained(which).state_dict()
    checkpoint = Checkpoint(locate(which))
    checkpoint.check()
    assert checkpoint.names == sorted(truth)
    assert all(torch.equal(checkpoint.tensor(name), truth[name]) for name in truth)
    loaded = load_model(which, "float32", "cpu")
    assert torch.equal(loaded.get_parameter(NORM), truth[NORM])
    loaded.save_pretrained(which.parent / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(which.parent / "again").get_parameter(NORM), truth[NORM])


def _adapter(folder, shards):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder)


def _only_an_adapter(folder, shards):
    _adapter(folder, shards)
    (folder / "config.json").unlink()


def _index(change):
    def case(folder, shards):
        (folder / "model.safetensors").unlink()
        for file in shards.glob("*.safetensors*"):
            shutil.copy(file, folder)
        if callable(change):
            edit(folder / INDEX, change)
        else:
            (folder / INDEX).write_bytes(change)

    return case


def _without_index(folder, shards):
    _index(lambda content: None)(folder, shards)
    (folder / INDEX).unlink()


def _outside(folder, shards):
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    _index(lambda content: content["weight_map"].update({NORM: "../model.safetensors"}))(folder, shards)


def _only_old(folder, shards):
    (folder / "model.safetensors").rename(folder / "model_old.safetensors")


def _distributed(folder, shards):
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")


def _pickled(folder, shards):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _unnamed(folder, shards):
    edit(folder / "config.json", lambda content: content.update(transformers_weights="../m/model.safetensors"))


REFUSED = {
    "an adapter on top": (_adapter, "adapter beside its weights"),
    "an adapter alone": (_only_an_adapter, "not a model"),
    "shards without an index": (_without_index, "restore the index"),
    "a whole file of another name": (_only_old, "model_old.safetensors"),
    "a distributed checkpoint": (_distributed, "distributed"),
    "pickles": (_pickled, "Pickled"),
    "no JSON": (_index(b"{"), INDEX),
    "no text": (_index(b"\xff\xfe\x00"), INDEX),
    "too deep": (_index(b"[" * 100_000), INDEX),
    "a list": (_index(b"[]"), "no JSON object"),
    "no weight_map": (_index(lambda content: content.pop("weight_map")), "no weight_map"),
    "an empty weight_map": (_index(lambda content: content.update(weight_map={})), "no weight_map"),
    "a weight_map of another type": (_index(lambda content: content.update(weight_map=["a"])), "no weight_map"),
    "a file of another type": (_index(lambda content: content["weight_map"].update({NORM: 3})), NORM),
    "no file at all": (_index(lambda content: content["weight_map"].update({NORM: ""})), NORM),
    "a file of another folder": (_outside, "no safetensors file of this folder"),
    "a pickled shard": (_index(lambda content: content["weight_map"].update({NORM: "a.bin"})), NORM),
    "a shard that is not there": (_index(lambda c: c["weight_map"].update({NORM: "a.safetensors"})), "missing"),
    "a tensor that is nowhere": (_index(lambda c: c["weight_map"].update({"a": c["weight_map"][NORM]})), "names a,"),
    "no metadata": (_index(lambda content: content.pop("metadata")), "metadata"),
    "a name outside the folder": (_unnamed, "transformers_weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_load_or_would_load_otherwise_is_one_line_everywhere(case, folder, shards):
    make, words = REFUSED[case]
    make(folder, shards)
    ways = (Checkpoint, lambda path: load_model(path, "float32", "cpu"), lambda path: validate_checkpoint(path, {}))
    for way in (*ways, locate):
        with pytest.raises(UserError) as caught:
            way(folder)
        assert words in str(caught.value), way
