"""From a name to a folder: built-in, local, hub. The hub is reached through the real client, offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import hub_server

from sparse_ft.cache import cache_dir, wheel_file
from sparse_ft.errors import UserError
from sparse_ft.models.catalog import (
    BUILT_IN,
    SMOLLM2,
    hub_commit,
    load_gguf,
    locate,
    locate_config,
    without_revision,
)
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.models.tiny import KINDS, make_tiny


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_are_made_once(kind: str, cache: Path):
    folder = locate(kind)
    assert cache in folder.parents
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert locate(kind) == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    assert load_model(folder).config.model_type == kind.removeprefix("tiny-")


def test_a_model_half_made_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            locate("tiny-llama")
    load_model(locate("tiny-llama"))


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_tiny("tiny-mistral", tmp_path / "owner" / "name")
    assert locate(folder) == locate(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == folder  # a folder that is there goes before a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/owner/name") == folder


def test_folders_that_are_no_whole_checkpoint(tmp_path: Path):
    folder = make_tiny("tiny-llama", tmp_path / "m")
    with pytest.raises(UserError, match="is a file"):
        locate(folder / "config.json")
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="1 of 2 shards are missing"):
        locate(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        locate(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UserError, match="adapter"):
        locate(folder)


@pytest.mark.parametrize("name", ["smollm3", "./absent", "a/b/c", "", "models:/x@y"])
def test_a_name_that_is_nothing_lists_what_there_is(name: str):
    with pytest.raises(UserError) as caught:
        locate(name or "no-such-model")
    assert "\n" not in str(caught.value) and all(model in str(caught.value) for model in BUILT_IN)


def test_hub_model_that_is_cached_is_found_offline(hub: Path, tmp_path: Path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--owner--name"
    make_tiny("tiny-llama", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = locate("owner/name")
    assert load_model(folder).config.hidden_size == 60
    assert locate(f"owner/name@{commit}") == folder and hub_commit(folder) == commit
    assert locate_config(f"owner/name@{commit}") == locate_config(folder) == folder / "config.json"
    assert hub_commit(tmp_path) is None
    with pytest.raises(UserError, match="owner/name is not in the local hub cache"):
        locate("owner/name@v2")
    (folder / "model.safetensors").unlink()  # an interrupted download
    with pytest.raises(UserError, match="owner/name"):
        locate("owner/name")


def test_hub_model_that_is_not_here_says_what_to_do(hub: Path):
    with pytest.raises(UserError, match=r"owner/name.*cannot be reached.*local folder") as caught:
        locate("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("owner/gated", "accept its licence"), ("owner/none", "is private")])
def test_what_the_hub_refuses_is_explained(name: str, words: str, hub: Path, tmp_path: Path, monkeypatch):
    from huggingface_hub import constants

    make_tiny("tiny-llama", tmp_path / "models" / "owner" / "gated")
    with hub_server(tmp_path, token="secret") as (address, _):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(UserError, match=words) as caught:
            locate(name)
    assert "hf auth login" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_id_without_its_revision(tmp_path: Path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert without_revision(f"owner/name@{commit}") == without_revision("owner/name") == "owner/name"
    folder = tmp_path / "me@host" / "model@2"
    folder.mkdir(parents=True)
    assert [without_revision(name) for name in (str(folder), "tiny-llama")] == [str(folder), "tiny-llama"]


@pytest.mark.slow
def test_smollm2_in_the_cache_is_the_model_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = locate("smollm2-135m")
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path))
    original, its_tokenizer = load_gguf(wheel_file(**SMOLLM2))
    assert cache_dir() == tmp_path
    model, tokenizer = load_model(folder, "float32", "cpu"), load_tokenizer(folder)
    text = "Title -- Größe of 12345 things:\n\n  is it true? Yes, they've said so."
    tokens = tokenizer(text, return_tensors="pt")
    assert tokens.input_ids.tolist() == [its_tokenizer(text).input_ids]
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, original(**tokens).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in (folder / "config.json").read_text()
    config = model.config  # as published with the model
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000 and config.max_position_embeddings == 8192
    assert not hasattr(config, "quantization_config")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (config.bos_token_id, config.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer  # weights in the right places, not only equal to themselves
