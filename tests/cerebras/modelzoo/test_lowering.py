"""Lowering for a wafer without a wafer: the part of the compiler that runs on the user's side."""

import json
import re
import sys

import pytest

from sparse_ft.cerebras.checkpoint import LoraPlan, ModelZooMasks
from sparse_ft.cerebras.config import TrainerPlan, create_sparse_config, write_config
from sparse_ft.cerebras.logs import classify_log
from sparse_ft.cerebras.runner import fit_command
from sparse_ft.masks.files import save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.names import prunable_names

MODES = ("dense", "sparse_to_dense", "sparse_to_sparse", "full")


def check_announced(folder, config, masks):
    """The sparsities that the lowered program states are those of the masks, tensor by tensor."""
    # The folder of the run is there once more as the link "latest".
    programs = (folder / "model_dir").glob("cerebras_logs/*/executors/*/cirh.mlir")
    (program,) = {path.resolve() for path in programs}
    announced = {float(value) for value in re.findall(r"\bsparsity = ([\d.e+-]+)", program.read_text())}
    if masks is None:
        assert not announced
        return
    by_name = ModelZooMasks(config, masks)
    measured = {by_name.sparsity(name) for name in by_name}
    # The program rounds to nine digits.
    for values, others in ((measured, announced), (announced, measured)):
        strangers = [value for value in values if min(abs(value - other) for other in others) > 1e-6]
        assert not strangers


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lowers_with_the_sparsity_that_was_measured(mode, kind, models, data, tmp_path, cszoo, zoo):
    config_file, masks, _ = zoo.prepare(models(kind), data, tmp_path, mode, device="CSX", steps=2)
    log = cszoo("fit", config_file, "--target_device", "CSX", "--validate_only")
    assert "Compile validated locally" in log
    check_announced(tmp_path, Checkpoint(models(kind)).config, masks)


def test_a_job_gets_as_far_as_the_cluster(models, data, tmp_path, cszoo, zoo):
    """The command of the documentation, whole: everything before the wafer is done, and its absence told by name."""
    config_file, *_ = zoo.prepare(models("llama"), data, tmp_path, "sparse_to_sparse", device="CSX", steps=2)
    command = fit_command(sys.executable, config_file, "CSX", ["mlflow_run=abc"])
    log = cszoo(*command[command.index("fit") :], check=False)
    assert "SparseMask: 14 tensors" in log and "Failed to connect to cluster" in log
    failure = classify_log(log.splitlines(), 1)
    assert failure.kind == "cluster_unreachable" and "mgmt_address" in failure.message


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_seven_billion_shapes_lower(kind, mode, tmp_path, cszoo):
    """LLaMA-2-7B and Mistral-7B: the configuration and the masks alone, no weights are needed to lower a model."""
    import resource

    import h5py
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    shape = {"llama": LlamaConfig(max_position_embeddings=4096), "mistral": MistralConfig(sliding_window=None)}[kind]
    config = {**shape.to_dict(), "rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        sizes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(shape).named_parameters()}
    shapes = {name: sizes[name] for name in prunable_names(config, sizes)}
    masks = None
    if mode != "dense":
        generator = torch.Generator().manual_seed(0)
        bits = {
            name: torch.randint(0, 256, (rows, columns // 8), dtype=torch.uint8, generator=generator)
            for name, (rows, columns) in shapes.items()
        }
        masks = MaskSet(bits, shapes)
        save_masks(masks, tmp_path / "masks.safetensors")
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "part0.h5", "w") as file:
        file["data"] = np.ones((16, 3, 512), np.int32)
        file.attrs["n_examples"] = 16
    trainer = create_sparse_config(
        config,
        tmp_path / "data",
        None if masks is None else tmp_path / "masks.safetensors",
        mode,
        hf_config=tmp_path / "config.json",
        start=tmp_path / "none.mdl",
        model_dir=tmp_path / "model_dir",
        plan=TrainerPlan(max_steps=2, batch_size=4, lora=LoraPlan.of(config, r=16, alpha=32, target_modules=None)),
    )
    del trainer["trainer"]["fit"]["ckpt_path"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    log = cszoo("fit", write_config(tmp_path / "fit.yaml", trainer), "--target_device", "CSX", "--validate_only")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{kind} {mode}: {after.ru_utime - before:.0f} processor seconds, memory {after.ru_maxrss / 1e6:.1f} GB")
    assert "Compile validated locally" in log
    check_announced(tmp_path, config, masks)
