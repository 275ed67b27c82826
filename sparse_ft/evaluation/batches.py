"""How many sequences go through a model at once."""

from __future__ import annotations

import psutil
import torch

from sparse_ft.models.sharding import own_rows

__all__ = ["rows_that_fit"]

_MOST = 64
_MOST_ON_CPU = 16
_TOKENS_ON_CPU = 1024  # more at once only costs padding: so many keep every core busy


def rows_that_fit(
    model: torch.nn.Module, seq_len: int, positions: int | None = None, tokens_at_once: int | None = None
) -> int:
    """Rows of ``seq_len`` tokens for one forward pass: a power of two.

    Counted are the logits over the vocabulary (they, a float32 copy and the log-softmax), which outweigh
    everything else, the keys and values, and the activations of one block. They may take a quarter of the
    memory that the weights leave. It is the memory the device *has*, not what happens to be free, because
    the batch size shows in the last digits and a model scored twice must give the same number.

    Args:
        model: on the device in question.
        seq_len: tokens of a row.
        positions: tokens of a row whose logits are made; None for all.
        tokens_at_once: tokens of a row in one pass, where that is not all of them (1 in generation).
    """
    parameter = next(model.parameters())
    config = model.config.get_text_config()
    hidden, size = config.hidden_size, parameter.element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    logits = (positions or seq_len) * config.vocab_size * (size + 8)
    activations = seq_len * (6 * hidden + 3 * inner + 2 * hidden * config.num_hidden_layers) * size
    own = [own_rows(weight)[0] for weight in model.parameters()]  # of a sharded model, what this device holds
    weights = sum(weight.numel() * weight.element_size() for weight in own)
    spare = (_memory(parameter.device) - weights) // 4
    most = _MOST
    if parameter.device.type == "cpu":
        most = min(_MOST_ON_CPU, max(1, _TOKENS_ON_CPU // (tokens_at_once or seq_len)))
    rows = 1
    while 2 * rows <= most and 2 * rows * (logits + activations) <= spare:
        rows *= 2
    return rows


def _memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
