"""How many sequences go through a model at once."""

from __future__ import annotations

import psutil
import torch

__all__ = ["rows_that_fit"]

_MOST = {"cpu": 8, "cuda": 64}


def rows_that_fit(model: torch.nn.Module, seq_len: int, positions: int | None = None) -> int:
    """Rows of ``seq_len`` tokens for one forward pass: a power of two.

    Counted are the logits over the vocabulary (they, a float32 copy and the log-softmax) for ``positions``
    of each row (all by default), which outweigh everything else, and the activations of one block. They
    may take a quarter of the memory that the weights leave. It is the memory the device *has*, not what
    happens to be free, because the batch size shows in the last digits and a model scored twice must give
    the same number. On a CPU more than a few rows gain nothing: one row keeps every core busy.
    """
    parameter = next(model.parameters())
    config = model.config.get_text_config()
    vocabulary, hidden = config.vocab_size, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    size = parameter.element_size()
    per_row = (positions or seq_len) * vocabulary * (size + 8) + seq_len * (6 * hidden + 3 * inner) * size
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    spare = (_memory(parameter.device) - weights) // 4
    most = _MOST.get(parameter.device.type, _MOST["cuda"])
    rows = 1
    while 2 * rows <= most and 2 * rows * per_row <= spare:
        rows *= 2
    return rows


def _memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
