"""How fast a model reads and writes: tokens per second, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

__all__ = ["Speed", "held_bytes", "measure_speed"]


@dataclass(frozen=True)
class Speed:
    """Tokens per second at one batch size, medians over the repeats.

    Attributes:
        batch: sequences at once.
        prefill: of the prompts, all at once.
        decoding: of what is written after them, one token of every sequence at a time.
    """

    batch: int
    prefill: float
    decoding: float


@torch.no_grad()  # and not inference_mode: what a module keeps of it could not be trained with afterwards
def measure_speed(model: PreTrainedModel, batch: int, prompt: int, new: int, repeats: int) -> Speed:
    """Reads ``batch`` random prompts and writes greedily after them; once for warming up, then ``repeats`` times.

    Args:
        model: in eval mode, on its device.
        batch: sequences at once.
        prompt: tokens of each.
        new: tokens to be written after each, at least one.
        repeats: of which the median is taken.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    prefills, decodings = [], []
    for repeat in range(repeats + 1):
        begin = _now(model.device)
        read = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        middle = _now(model.device)
        cache, logits = read.past_key_values, read.logits
        for _ in range(new):
            written = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
            cache, logits = written.past_key_values, written.logits
        end = _now(model.device)
        if repeat:
            prefills.append(middle - begin)
            decodings.append(end - middle)
    return Speed(batch, batch * prompt / median(prefills), batch * new / median(decodings))


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory, tied ones once; of sparse tensors those of their parts."""
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
