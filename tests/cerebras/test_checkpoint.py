"""Start checkpoints and merges against the formula, without ModelZoo; with it: tests/cerebras/modelzoo."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from sparse_ft.cerebras.checkpoint import LoraPlan, ModelZooMasks, merge_checkpoint, write_start_checkpoint
from sparse_ft.errors import UserError
from sparse_ft.masks.files import save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.cerebras.mdl import MdlFile, write_mdl
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import Progress
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


def test_experts_in_one_tensor_and_one_by_one_start_alike(tmp_path):
    model = random_model("mixtral")
    model.save_pretrained(tmp_path / "single")
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((tmp_path / "single" / "config.json").read_bytes())
    save_file(model.state_dict(), fused / "model.safetensors")
    begun = []
    for folder in (tmp_path / "single", fused):
        source, shown = Checkpoint(folder), Shown()
        lora = LoraPlan.of(source.config, r=4, alpha=8, target_modules=None)
        file = MdlFile(write_start_checkpoint(source, folder / "start.mdl", None, lora, progress=shown))
        begun.append({name: file.read(name) for name in file.entries})
        assert shown.done == shown.total > 0
    assert begun[0].keys() == begun[1].keys()
    assert all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0])


class Shown(Progress):
    """How far a stage says that it is."""

    total = done = 0

    def start(self, stage, total, unit=""):
        self.total = total

    def advance(self, amount=1, note=""):
        self.done += amount


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


# Each step in a process of its own: what went before, here or there, would stand in its peak, and not every system
# lets a process reset that.
STEP = """
import sys
from pathlib import Path
from sparse_ft.cerebras.checkpoint import LoraPlan, merge_checkpoint, write_start_checkpoint
from sparse_ft.masks.files import load_masks
from sparse_ft.memory import peak_bytes, reset_peak
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.validation import validate_checkpoint

def work(step, folder):
    source, lora, masks = Checkpoint(folder), LoraPlan(r=4, alpha=8), load_masks(folder / "masks.safetensors")
    start, merged = folder / "start.mdl", folder / "merged.mdl"
    if step == "start":
        write_start_checkpoint(source, start, masks, lora)
    elif step == "merge":
        merge_checkpoint(start, merged, source.config, "sparse_to_sparse", masks, lora.scaling)
    else:
        assert validate_checkpoint(merged, masks).ok

work(sys.argv[1], Path(sys.argv[2]))  # libraries are loaded, and memory is taken, that any size needs
reset_peak()
before = peak_bytes()
work(sys.argv[1], Path(sys.argv[3]))
print(peak_bytes() - before)
"""


@pytest.mark.slow
def test_memory_stays_within_a_few_tensors(tmp_path):
    """Start, merge and validation of a model of 24 blocks: what is held grows with a tensor, not with the model."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 64, "num_attention_heads": 8}
    sizes, largest = {}, 1024 * 512 * 4
    for name, blocks in (("small", 1), ("large", 24)):
        config = LlamaConfig(**shape, num_hidden_layers=blocks, num_key_value_heads=8, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / name)
        sizes[name] = model.num_parameters() * 4
        shapes = Checkpoint(tmp_path / name).prunable_shapes()
        kept = {tensor: torch.rand(shapes[tensor]) >= 0.5 for tensor in shapes}
        save_masks(MaskSet.from_bool(kept), tmp_path / name / "masks.safetensors")
    assert sizes["large"] > 100 * largest
    peaks = {}
    for step in ("start", "merge", "validate"):
        program = [sys.executable, "-c", STEP, step, str(tmp_path / "small"), str(tmp_path / "large")]
        run = subprocess.run(program, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks[step] = int(run.stdout.splitlines()[-1]) / largest
    assert max(peaks.values()) < 32, peaks  # of which the masks, in bits, are 4


def test_masks_have_modelzoos_names(tmp_path, random_masks):
    source, masks, _, trained = start("mixtral", tmp_path, "full", random_masks)
    by_name = ModelZooMasks(source.config, masks)
    assert {f"model.{name}_mask" for name in by_name} == {name for name in trained if name.endswith("_mask")}
    for name in by_name:
        assert torch.equal(by_name[name], trained[f"model.{name}_mask"])
        assert by_name.sparsity(name) == pytest.approx(1 - by_name[name].float().mean().item())
