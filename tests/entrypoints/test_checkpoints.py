"""Checkpoints as people have them, through the steps: each loads as what it is, or is refused before any mask."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from sparse_ft.masks.files import load_masks
from sparse_ft.models.catalog import locate
from sparse_ft.models.tiny import tiny_tokenizer
from sparse_ft.tracking.runs import Tracker

SMALL = {"data_dir": "made", "max_steps": 2, "batch_size": 2, "eval_limit": 4, "perplexity_tokens": 256,
         "max_seq_len": 128, "lora_r": 2}  # fmt: skip
CALIBRATED = {"data_dir": "made", "calibration_samples": 2, "calibration_seq_len": 16}


@pytest.fixture
def model(tmp_path):
    """A tiny llama in a folder of its own, with ``change(weights)`` and further values of its config.json."""

    def write(change=lambda weights: weights, name="m", **config):
        folder = shutil.copytree(locate("tiny-llama"), tmp_path / name)
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        stored = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(stored))
        return folder

    return write


def rotary(weights):
    """What LLaMA-2's own files have, and FP8 exports."""
    extra = {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.arange(5.0) for block in range(2)}
    return weights | extra | {"model.layers.0.self_attn.k_scale": torch.tensor(0.5)}


@pytest.mark.parametrize("mode", ["sparse_to_sparse", "dense", "full"])
def test_a_cell_ends_whatever_the_checkpoint_carries(command, model, tmp_path, mode):
    status, _, err = command("train", model=model(rotary), mode=mode, output_dir=tmp_path / "out", **SMALL)
    assert status == 0, err
    (run,) = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    assert run.status == "FINISHED" and run.metrics.get("sparsity/violations", 0) == 0


@pytest.mark.parametrize("how", [{}, {"importance": "wanda"}, {"importance": "sparsegpt"}, {"importance": "taylor"},
                                 {"importance": "alps", "reconstruct": "block", "reconstruct_epochs": 1},
                                 {"method": "structured", "shrink": True}])  # fmt: skip
def test_masks_are_those_without_what_is_carried(command, model, tmp_path, how):
    for name, change in (("with", rotary), ("without", lambda weights: weights)):
        folder = model(change, name)
        status, _, err = command("compute_masks", model=folder, output_dir=tmp_path / "o" / name, **CALIBRATED, **how)
        assert status == 0, err
    one, other = [load_masks(next((tmp_path / "o" / name).glob("*.safetensors"))) for name in ("with", "without")]
    assert one.checksum == other.checksum
    coverage = [json.loads((tmp_path / "o" / name / "coverage.json").read_text()) for name in ("with", "without")]
    assert coverage[0]["tensors_carried"] == sorted(set(rotary({})))
    assert coverage[1]["tensors_carried"] == []
    assert coverage[0]["parameters"] == coverage[1]["parameters"]
    for smaller in (tmp_path / "o" / "with").glob("smaller_*"):
        assert "model.layers.0.self_attn.k_scale" in load_file(smaller / "model.safetensors")
        AutoModelForCausalLM.from_pretrained(smaller)
    for updated in (tmp_path / "o" / "with").glob("*/model.safetensors"):
        assert set(rotary({})) <= set(load_file(updated))


def test_a_cell_on_plain_weights_that_were_once_quantised(command, model, tmp_path):
    folder = model(quantization_config={"quant_method": "gptq", "bits": 4})
    status, _, err = command("train", model=folder, output_dir=tmp_path / "out", register_as="plain", **SMALL)
    assert status == 0, err


def packed(weights):
    return {n: torch.zeros(w.numel() // 2, 1, dtype=torch.uint8) if "proj" in n else w for n, w in weights.items()}


@pytest.mark.parametrize("step", ["compute_masks", "train"])
@pytest.mark.parametrize("method", ["random", "unstructured"])
def test_packed_weights_are_refused_before_masks(command, model, tmp_path, step, method):
    folder = model(packed, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    status, _, err = command(step, model=folder, method=method, output_dir=tmp_path / "out")
    assert status == 2 and "quantization_config" in err and err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_shards_without_an_index_are_refused_before_masks(command, model, tmp_path):
    folder = model()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in (0, 1):
        save_file(dict(list(weights.items())[part::2]), folder / f"model-0000{part + 1}-of-00002.safetensors")
    for step in ("compute_masks", "train"):
        status, _, err = command(step, model=folder, output_dir=tmp_path / "out")
        assert status == 2 and "index" in err and not (tmp_path / "out").exists()


def test_structured_masks_take_whole_heads_where_config_json_leaves_their_number_out(command, tmp_path):
    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=132, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=8, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "config.json").read_text())
    del stored["num_key_value_heads"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(stored))
    status, _, err = command(
        "compute_masks", model=tmp_path / "m", method="structured", shrink=True, output_dir=tmp_path / "out"
    )
    assert status == 0, err
    keys = load_masks(tmp_path / "out" / "masks_sparsity50_structured.safetensors")[
        "model.layers.0.self_attn.k_proj.weight"
    ]
    rows = keys.any(dim=1).view(8, 8).sum(dim=1)
    assert set(rows.tolist()) == {0, 8}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "smaller_sparsity50_structured")


# -- what validate's statuses mean


def _truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def _lost(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def _eight_bits(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")


def _config(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    "damage",
    [_truncated, _adapter, _lost, _eight_bits, _config("{"), _config("[]"), _config('{"model_type": "gpt2"}'),
     _config('{"model_type": "llama", "num_hidden_layers": "x"}'), lambda folder: (folder / "config.json").unlink()],
)  # fmt: skip
def test_files_that_do_not_fit_are_2_and_never_1(command, model, tmp_path, damage):
    folder = model()
    assert command("compute_masks", model=folder, output_dir=tmp_path / "o")[0] == 0
    damage(folder)
    masks = next((tmp_path / "o").glob("*.safetensors"))
    status, _, err = command("validate", checkpoint=folder, masks=masks)
    assert status == 2 and err.strip().count("\n") == 0, err


def test_an_unexpected_error_is_70_with_its_traceback(command, model, tmp_path, monkeypatch):
    assert command("compute_masks", model=model(), output_dir=tmp_path / "o")[0] == 0

    def broken(*_, **__):
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr("sparse_ft.commands.validate.validate_checkpoint", broken)
    masks = next((tmp_path / "o").glob("*.safetensors"))
    status, _, err = command("validate", checkpoint=tmp_path / "m", masks=masks)
    assert status == 70 and "ZeroDivisionError: no such thing" in err and "Traceback" in err


@pytest.mark.parametrize("name", ["a/b", "", "x" * 300])  # others are in tests/tracking
def test_a_name_that_the_registry_cannot_take_is_said_before_anything(command, tmp_path, name):
    status, _, err = command("train", model="tiny-llama", register_as=name, output_dir=tmp_path / "out", **SMALL)
    assert status == 2 and "register_as" in err and not (tmp_path / "out").exists()
    assert Tracker().search() == []
