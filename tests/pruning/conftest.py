"""Checkpoints of chosen dtypes, shards and contents, written without building a model."""

import json

import pytest
import torch
from safetensors.torch import save_file


def _llama(folder, dtype=torch.bfloat16, shards=1, seed=0, hidden=40, inner=72, blocks=2, values=None, mixed=False):
    """A llama folder; ``values`` (tensor) restricts weights to those, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    heads, groups = 4, 2
    head = hidden // heads
    shapes = {"model.embed_tokens.weight": (16, hidden), "model.norm.weight": (hidden,)}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (groups * head, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (groups * head, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    kinds = [torch.float32, torch.bfloat16, torch.float16] if mixed else [dtype]
    tensors = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if values is None:
            tensor = torch.randn(shape, generator=generator) * 0.05
        else:
            tensor = values[torch.randint(len(values), shape, generator=generator)]
        tensors[name] = tensor.to(kinds[index % len(kinds)])
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    files = [f"model-{index + 1:05d}.safetensors" for index in range(shards)] if shards > 1 else ["model.safetensors"]
    for index, file in enumerate(files):
        save_file({name: tensors[name] for name in names[index::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[index % shards] for index, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


@pytest.fixture
def write_llama(tmp_path):
    """``write_llama(name, **how) -> (folder, tensors)``."""
    return lambda name="model", **how: _llama(tmp_path / name, **how)


@pytest.fixture
def text():
    """Token ids for the tiny models, int64 [4, 24]."""
    return torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(5))


def lowest(scores, k):
    """The oracle of every exact mask: a stable sort. Kept = True."""
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().double().argsort(stable=True)[:k]] = False
    return kept.view(scores.shape)


@pytest.fixture(name="lowest")
def _lowest():
    return lowest


def eliminated(weight, kept, hessian, damping=0.01):
    """Optimal brain surgeon: every pruned weight is taken out by the exact solution for the columns after it."""
    weight, size = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + damping * hessian.diagonal().mean().double() * torch.eye(size, dtype=torch.float64)
    for j in range(size):
        # minimise d H d^T over the changes d of the columns from j on, with w_j + d_j = 0
        answer = torch.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, j])
        gone = torch.where(kept[:, j], 0, weight[:, j])
        weight[:, j + 1 :] += gone[:, None] * answer
        weight[:, j] -= gone
    return weight


@pytest.fixture(name="eliminated")
def _eliminated():
    return eliminated


def least_squares(weight, kept, hessian, damping=0.01):
    """Row by row the normal equations of the kept weights S: H_SS w_S = (H w0)_S."""
    weight, size = weight.double(), weight.shape[1]
    damped = hessian.double() + damping * hessian.diagonal().mean().double() * torch.eye(size, dtype=torch.float64)
    new = torch.zeros_like(weight)
    for row, stay in enumerate(kept):
        if stay.any():
            new[row, stay] = torch.linalg.solve(damped[stay][:, stay], (damped @ weight[row])[stay])
    return new


@pytest.fixture(name="least_squares")
def _least_squares():
    return least_squares
