"""Models without their weights: every parameter has its shape, and no memory."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.skeleton import model_config

__all__ = ["hollow_model", "is_hollow"]


def hollow_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint without its weights: parameters have shapes and no memory, buffers their values."""
    config = model_config(checkpoint.folder)
    attention = architecture_of(config.to_dict()).attention
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    hollow: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = hollow.setdefault(parameter, nn.Parameter(shape))
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    model.config.name_or_path = model.name_or_path = str(checkpoint.folder)
    return model.eval()


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no memory for it."""
    return tensor.numel() > 1 and not any(tensor.stride())
