"""What a cell takes at its peak from the merge on, stage by stage, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_ft
from sparse_ft.lora import LoraSettings, apply_sparse_lora, merge_all_lora_weights, remask
from sparse_ft.lora.merge import adapted_layers
from sparse_ft.lora.rounding import dither
from sparse_ft.masks.mask_set import MaskSet, packed_shape
from sparse_ft.memory import peak_bytes, release_memory, reset_peak
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model, load_state_into, prunable_shapes, save_model
from sparse_ft.models.tiny import make_tiny
from sparse_ft.tracking.models import log_model, register_model
from sparse_ft.tracking.runs import Tracker
from sparse_ft.validation import validate_checkpoint

MB = 1 << 20


def make(folder, kind, dtype):
    """A checkpoint of some 200 MB in shards of 20 MB: like LLaMA-2's, only smaller."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 512}
    if kind == "llama":
        config = LlamaConfig(**shape, intermediate_size=2048, num_hidden_layers=14 if dtype != "float32" else 7)
        model = LlamaForCausalLM(config)
    else:
        config = MixtralConfig(**shape, intermediate_size=1024, num_hidden_layers=8, num_local_experts=4)
        model = MixtralForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20MB")
    assert len(list(Path(folder).glob("*.safetensors"))) > 4


def register(tracker, folder):
    run_id = tracker.start_child(None, "cell")
    register_model(tracker, log_model(tracker, run_id, folder, "model"), "sparse", alias="sparse50")


def measure(base, kind, mode, dtype):
    """Peaks of the stages, in bytes above what is resident before; the weights, and the largest of them."""
    torch.set_num_threads(1)
    base = Path(base)
    tiny = make_tiny("tiny-llama", base.parent / "tiny")
    tracker = Tracker(f"sqlite:///{base.parent / 'mlflow.db'}", "memory")
    register(tracker, tiny)  # the libraries are loaded, the tables made
    model = load_model(base, dtype, "cpu")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    masks = None
    if mode != "dense":
        packed = {}
        for name, shape in prunable_shapes(model).items():
            packed[name] = torch.randint(0, 256, packed_shape(shape), dtype=torch.uint8)
        masks = MaskSet(packed, prunable_shapes(model))
    model = apply_sparse_lora(model, LoraSettings(lora_r=4, lora_alpha=8), mode, masks)
    for _, layer in adapted_layers(model):
        layer.lora_B["default"].weight.data.normal_(std=1e-3)
    for parameter in model.parameters():  # every page of the files is in memory
        parameter.data.view(-1)[::512].sum()
    dither(torch.randn(4, 4), torch.bfloat16, 1)  # the compiled loop and its compiler are loaded
    peaks = {}

    def stage(name, work):
        release_memory()
        if not reset_peak():
            print("null")
            raise SystemExit
        before = peak_bytes()
        result = work()
        peaks[name] = peak_bytes() - before
        return result

    model = stage("merge", lambda: merge_all_lora_weights(model))
    merged = base.parent / "merged"
    stage("save", lambda: save_model(model, None, merged, "20MB"))
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, merged)
    stage("register", lambda: register(tracker, merged))
    if masks is not None:
        found = stage("validate", lambda: validate_checkpoint(merged, masks, base=base))
        assert (found.violations == 0) == (mode == "sparse_to_sparse")
        stage("remask", lambda: remask(model, masks))
    start = Checkpoint(base)
    stage("restore", lambda: load_state_into(model, start, start.prunable))
    print(json.dumps({"weights": weights, "largest": largest, "peaks": peaks}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "dtype"),
    [
        ("llama", "sparse_to_sparse", "bfloat16"),
        ("llama", "dense", "float32"),
        ("mixtral", "sparse_to_sparse", "bfloat16"),
        ("mixtral", "sparse_to_dense", "bfloat16"),
    ],
)
def test_merging_a_model_of_sharded_files_takes_one_layer_beside_it(kind, mode, dtype, tmp_path):
    make(tmp_path / "base", kind, dtype)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sparse_ft.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path / "base"), kind, mode, dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("this system does not let a process reset its own peak of memory")
    # One layer (its float32 sum, where the result is rounded from that), a shard's pages, and what the libraries keep.
    layer = found["largest"] * (1 if dtype == "float32" else 2)
    assert found["weights"] > 2 * (layer + 32 * MB)  # a second copy of the weights would be seen
    checked = set() if mode == "dense" else {"validate", "remask"}
    assert found["peaks"].keys() == {"merge", "save", "register", "restore"} | checked
    for name, peak in found["peaks"].items():
        assert peak < layer + 32 * MB, name


if __name__ == "__main__":  # the process that is measured
    measure(*sys.argv[1:])
