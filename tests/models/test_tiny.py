"""The tiny models: small, whole, the same bytes every time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_ft.models.catalog import BUILT_IN, TINY_RECIPE
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import ARCHITECTURES
from sparse_ft.models.tiny import KINDS, make_tiny, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_tiny_model_is_small_and_transformers_loads_it_as_it_is(folder: Path):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32 and model.config.max_position_embeddings >= 2048
    logits = model(**tokenizer("Question: is it true?\nAnswer:", return_tensors="pt")).logits
    assert torch.isfinite(logits).all() and logits.shape[-1] >= len(tokenizer) >= 512
    assert logits[0, -1].std() > 0.1  # random weights that still tell tokens apart


def test_a_tiny_model_has_what_real_ones_have(folder: Path):
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    # OLMoE's heads make up its hidden size, and torch's grouped product wants that to be a multiple of 8.
    assert any(checkpoint.shape(name)[-1] % 8 for name in checkpoint.prunable) or config["model_type"] == "olmoe"
    assert all(checkpoint.shape(name)[-1] % 4 == 0 for name in checkpoint.prunable)  # 2:4 patterns fit
    assert ("lm_head.weight" in checkpoint.names) is not config["tie_word_embeddings"]


def test_kinds_differ_in_tied_embeddings_and_head_size():
    configs = [tiny_config(kind) for kind in KINDS]
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    sizes = [getattr(config, "head_dim", None) for config in configs]
    assert None in sizes and any(size and size != 48 // 6 for size in sizes)


@pytest.mark.slow
def test_same_bytes_in_another_process_and_whatever_the_random_state(tmp_path: Path):
    code = """
import sys, torch
from sparse_ft.models.tiny import make_tiny
torch.manual_seed(5)
for kind in sys.argv[2:]:
    make_tiny(kind, f"{sys.argv[1]}/{kind}")
"""
    kinds = ("tiny-mixtral", "tiny-qwen2_moe", "tiny-llama", "tiny-gemma2")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "theirs"), *kinds], check=True)
    for kind in reversed(kinds):
        ours = make_tiny(kind, tmp_path / "ours" / kind)
        assert digests(ours) == digests(tmp_path / "theirs" / kind)


def test_the_callers_random_state_is_left_alone(tmp_path: Path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make_tiny("tiny-llama", tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", ["Question: yes or no?\nAnswer: yes", "Größe 12,5 €\t漢字 🙂\n\n", ""])
def test_the_tokenizer_reads_any_text_and_begins_as_llama_does(text: str):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


def test_answers_are_single_tokens_and_special_tokens_are_three():
    tokenizer = tiny_tokenizer()
    for answer in (" yes", " no"):
        assert len(tokenizer(answer, add_special_tokens=False).input_ids) == 1
    assert {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} == {0, 1, 2}


def test_every_family_has_one_that_is_built_in():
    assert BUILT_IN[1:] == KINDS == tuple(f"tiny-{family}" for family in ARCHITECTURES)


def test_unknown_kind():
    with pytest.raises(ValueError, match="tiny-gpt"):
        tiny_config("tiny-gpt")


def test_other_shapes_are_another_recipe(tmp_path: Path):
    """Caches keep a model under its recipe's number: whoever changes the files raises it, and writes both here."""
    shapes = hashlib.sha256()
    for kind in ("tiny-llama", "tiny-mistral", "tiny-mixtral"):  # of the others the sizes are part of the cache's name
        checkpoint = Checkpoint(make_tiny(kind, tmp_path / kind))
        for name in checkpoint.names:
            shapes.update(f"{kind} {name} {checkpoint.shape(name)}\n".encode())
    assert (TINY_RECIPE, shapes.hexdigest()[:16]) == (2, "a718e81858883e68")
