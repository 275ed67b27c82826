"""These tests run against the real ModelZoo 2.10: make test-modelzoo MODELZOO=PATH."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("cerebras") is None or importlib.util.find_spec("cerebras.modelzoo") is None:
    collect_ignore_glob = ["*"]

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.12,
}  # fmt: skip
SPECIAL = {
    "llama": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "mistral": {"rope_theta": 1000000.0, "sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}


def transformers_config(kind):
    from transformers import LlamaConfig, MistralConfig, MixtralConfig

    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "mixtral": MixtralConfig}
    return classes[kind](**SHAPE, **SPECIAL[kind])


def random_masks(checkpoint, sparsity=0.6, seed=0):
    import torch

    from sparse_ft.masks.mask_set import MaskSet

    generator = torch.Generator().manual_seed(seed)
    shapes = checkpoint.prunable_shapes()
    masks = {name: torch.rand(shape, generator=generator) >= sparsity for name, shape in shapes.items()}
    return MaskSet.from_bool(masks)


def prepare(folder, data, work, mode, device="CPU", steps=5, **settings):
    """Masks, start checkpoint and configuration for one run; returns (config file, masks, plan)."""
    from sparse_ft.cerebras.checkpoint import LoraPlan, write_start_checkpoint
    from sparse_ft.cerebras.config import TrainerPlan, create_sparse_config, write_config
    from sparse_ft.cerebras.convert import to_modelzoo
    from sparse_ft.masks.files import save_masks
    from sparse_ft.models.checkpoint import Checkpoint
    from sparse_ft.models.opening import open_checkpoint

    source = Checkpoint(folder)
    work.mkdir(parents=True, exist_ok=True)
    lora = LoraPlan.of(source.config, r=4, alpha=8, target_modules=None)
    settings = {"max_steps": steps, "batch_size": 4, "learning_rate": 1e-2, **settings}
    plan = TrainerPlan(lora=lora, device=device, **settings)
    masks = None if mode == "dense" else random_masks(source)
    if masks is not None:
        save_masks(masks, work / "masks.safetensors")
    converted = folder.with_suffix(".cs") / "model.mdl"
    if not converted.exists():
        to_modelzoo(folder, converted)
    converted = open_checkpoint(converted)
    (work / "config.json").write_text(json.dumps(source.config))
    write_start_checkpoint(converted, work / "start.mdl", masks, None if mode == "full" else lora)
    config = create_sparse_config(
        source.config,
        data,
        None if masks is None else work / "masks.safetensors",
        mode,
        hf_config=work / "config.json",
        start=work / "start.mdl",
        model_dir=work / "model_dir",
        plan=plan,
    )
    return write_config(work / "fit.yaml", config), masks, plan


@pytest.fixture(scope="session")
def zoo():
    """The functions above: test modules cannot import a conftest."""
    return SimpleNamespace(prepare=prepare, random_masks=random_masks, transformers_config=transformers_config)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny checkpoints whose config.json is written as transformers 5 writes it."""
    import torch
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")

    def make(kind):
        folder = root / kind
        if not folder.exists():
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(transformers_config(kind)).save_pretrained(folder)
            file = folder / "config.json"
            config = json.loads(file.read_text())
            config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
            config.pop("rope_scaling", None)
            config["dtype"] = config.pop("torch_dtype", config.pop("dtype", "float32"))
            file.write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """64 sequences of 32 random tokens in ModelZoo's HDF5."""
    import h5py
    import numpy as np

    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(3, 500, (64, 33)).astype(np.int32)
    with h5py.File(folder / "part0.h5", "w") as file:
        file["data"] = np.stack([tokens[:, :-1], np.ones_like(tokens[:, 1:]), tokens[:, 1:]], axis=1)
        file.attrs["n_examples"] = 64
    return folder


@pytest.fixture
def cszoo(tmp_path):
    """Runs ModelZoo's command line with our callbacks, in a process of its own; gives everything it printed."""

    def run(*arguments, check=True):
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "sparse_ft.cerebras.modelzoo.cszoo", *map(str, arguments)]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
        )
        if check and result.returncode != 0:
            raise AssertionError(f"cszoo ended with {result.returncode}:\n{result.stdout[-4000:]}")
        return result.stdout

    return run
