"""Start checkpoints and merges against the formula, without ModelZoo; with it: tests/cerebras/modelzoo."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from sparse_ft.cerebras.checkpoint import LoraPlan, ModelZooMasks, merge_checkpoint, write_start_checkpoint
from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.memory import reset_peak
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.mdl import MdlFile, write_mdl
from sparse_ft.validation import validate_checkpoint

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "mixtral": MixtralConfig}
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SPARSE = ("sparse_to_dense", "sparse_to_sparse", "full")


def random_model(kind):
    torch.manual_seed(0)
    extra = {"num_local_experts": 3} if kind == "mixtral" else {"tie_word_embeddings": kind == "llama"}
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**SHAPE, **extra))


def start(kind, tmp_path, mode, random_masks):
    """A tiny model's start checkpoint as trained: its factors filled with noise. With the masks and the plan."""
    model = random_model(kind)
    model.save_pretrained(tmp_path / "hf")
    source = Checkpoint(tmp_path / "hf")
    masks = None if mode == "dense" else MaskSet.from_bool(random_masks(model))
    lora = None if mode == "full" else LoraPlan.of(source.config, r=4, alpha=8, target_modules=None)
    begun = MdlFile(write_start_checkpoint(source, tmp_path / "start.mdl", masks, lora))
    trained = {name: begun.read(name) for name in begun.entries}
    for name in trained:
        if name.endswith(".lora_B"):
            assert not trained[name].any()
            trained[name] = torch.randn_like(trained[name])
    with write_mdl(tmp_path / "trained.mdl") as writer:
        for name, tensor in trained.items():
            writer.write(name, tensor)
    return source, masks, lora, trained


@pytest.mark.parametrize("mode", ["dense", *SPARSE])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_merge_is_the_formula_of_its_mode(kind, mode, tmp_path, random_masks):
    source, masks, lora, trained = start(kind, tmp_path, mode, random_masks)
    scaling = lora.scaling if lora else None
    merged = merge_checkpoint(tmp_path / "trained.mdl", tmp_path / "m.mdl", source.config, mode, masks, scaling)
    found = MdlFile(merged)
    assert not [name for name in found.entries if "lora" in name or "mask" in name]
    adapted = 0
    for name in found.entries:
        weight, module = trained[f"model.{name}"].double(), f"model.{name.removesuffix('.weight')}"
        mask = trained.get(f"model.{name}_mask")
        expected = weight if mask is None else weight * mask
        if f"{module}.lora_A" in trained:
            update = 2.0 * trained[f"{module}.lora_B"].double() @ trained[f"{module}.lora_A"].double()
            expected = expected + (update if mode != "sparse_to_sparse" else update * mask)
            adapted += 1
        torch.testing.assert_close(found.read(name).double(), expected, rtol=1e-5, atol=1e-6)
    assert adapted == (0 if mode == "full" else 2 * (4 if kind == "mixtral" else 7))
    if mode in ("sparse_to_sparse", "full"):
        (tmp_path / "config.json").write_text(json.dumps(source.config))
        report = validate_checkpoint(merged, masks)
        assert report.ok and report.sparsity == masks.sparsity


def test_what_does_not_go_together_is_refused(tmp_path, random_masks):
    source, masks, _, _ = start("llama", tmp_path, "sparse_to_sparse", random_masks)
    other = MaskSet.from_bool(random_masks(random_model("llama"), seed=9))
    for mode, given, scaling, words in (
        ("sparse", masks, 2.0, "must be one of"),
        ("dense", masks, 2.0, "without masks"),
        ("full", masks, None, "does not go with mode full"),
        ("sparse_to_sparse", masks, None, "say its scaling"),
        ("sparse_to_sparse", other, 2.0, "trained under another mask"),
    ):
        with pytest.raises(UserError, match=words):
            merge_checkpoint(tmp_path / "trained.mdl", tmp_path / "m.mdl", source.config, mode, given, scaling)
        assert not (tmp_path / "m.mdl").exists()


# In a process of its own: what other tests left in this one's heap, or do in its threads, moves its peak too.
STREAMED = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from sparse_ft.cerebras.checkpoint import LoraPlan, merge_checkpoint, write_start_checkpoint
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.memory import peak_bytes, reset_peak
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.mdl import MdlFile, write_mdl
from sparse_ft.validation import validate_checkpoint

folder, peaks = Path(sys.argv[1]), {}
model = AutoModelForCausalLM.from_config(LlamaConfig(**json.loads(sys.argv[2])))
model.save_pretrained(folder)
size = model.num_parameters() * 4
del model
source, lora = Checkpoint(folder), LoraPlan(r=4, alpha=8)
masks = MaskSet.from_bool({name: torch.rand(shape) >= 0.5 for name, shape in source.prunable_shapes().items()})
with write_mdl(folder / "first.mdl") as writer:  # HDF5's own libraries are loaded once
    writer.write("x", torch.zeros(2, 2))
MdlFile(folder / "first.mdl").read("x")

def measured(name, work):
    assert reset_peak()
    before = peak_bytes()
    result = work()
    peaks[name] = peak_bytes() - before
    return result

begun = measured("start", lambda: write_start_checkpoint(source, folder / "start.mdl", masks, lora))
merge = (folder / "merged.mdl", source.config, "sparse_to_sparse", masks, lora.scaling)
merged = measured("merge", lambda: merge_checkpoint(begun, *merge))
assert measured("validate", lambda: validate_checkpoint(merged, masks)).ok
print(json.dumps({"size": size, "peaks": peaks}))
"""


def test_memory_stays_within_a_few_tensors(tmp_path):
    """Start, merge and validation of a model of 24 blocks: what is held grows with a tensor, not with the model."""
    if not reset_peak():
        pytest.skip("this system lets no process reset its peak")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24, "vocab_size": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    program = [sys.executable, "-c", STREAMED, str(tmp_path), json.dumps(shape | heads)]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, largest = json.loads(run.stdout.splitlines()[-1]), 1024 * 512 * 4
    assert found["size"] > 100 * largest
    peaks = {name: peak / largest for name, peak in found["peaks"].items()}
    assert max(peaks.values()) < 16, peaks


def test_masks_have_modelzoos_names(tmp_path, random_masks):
    source, masks, _, trained = start("mixtral", tmp_path, "full", random_masks)
    by_name = ModelZooMasks(source.config, masks)
    assert {f"model.{name}_mask" for name in by_name} == {name for name in trained if name.endswith("_mask")}
    for name in by_name:
        assert torch.equal(by_name[name], trained[f"model.{name}_mask"])
        assert by_name.sparsity(name) == pytest.approx(1 - by_name[name].float().mean().item())
