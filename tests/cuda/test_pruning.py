"""Masks made with a model on a GPU against those made on a CPU: but for near-ties they are the same."""

import pytest
import torch

from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("tiny-llama", {"importance": "gradient", "scope": "layer"}),
        ("tiny-mixtral", {"importance": "taylor", "scope": "global"}),
        ("tiny-llama", {"importance": "wanda", "scope": "row"}),
        ("tiny-mistral", {"importance": "wanda", "scope": "row", "allocation": "owl"}),
        ("tiny-mixtral", {"importance": "wanda", "scope": "row"}),
        ("tiny-llama", {"importance": "sparsegpt", "scope": "layer"}),
        ("tiny-mistral", {"importance": "sparsegpt", "method": "semi_structured"}),
        ("tiny-mixtral", {"importance": "wanda", "scope": "row", "update": "refit"}),
        ("tiny-mistral", {"importance": "alps", "allocation": "dlp"}),
        ("tiny-llama", {"importance": "alps", "method": "semi_structured"}),
        ("tiny-llama", {"importance": "taylor", "method": "structured", "scope": "layer"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_masks_of_a_gpu_are_those_of_a_cpu(tiny_model, tmp_path, model, how):
    text = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(5))
    masks = {}
    for device in ("cpu", "cuda"):
        settings = PruningSettings(sparsities=(0.3, 0.6), dtype="float32", device=device, **how)
        if how.get("method") == "semi_structured":
            settings = PruningSettings(dtype="float32", device=device, **how)
        generator = MaskGenerator(tiny_model(model), settings, Calibration(text, {"task": "noise"}))
        masks[device] = [file.load() for file in generator.generate(tmp_path / device, figures="none")]
    for here, there in zip(masks["cpu"], masks["cuda"], strict=True):
        assert here.n_pruned == there.n_pruned  # the counts are exact on both
        differing = sum(int((here[name] ^ there[name]).sum()) for name in here)
        assert differing <= 0.002 * here.n_weights
