"""Whether effective weights stay in memory from forward to backward: as asked, or where the device has the room."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_ft.cores import cores
from sparse_ft.lora.layer import MaskedBase
from sparse_ft.memory import free_bytes, held_bytes, peak_bytes
from sparse_ft.settings.lora import ALWAYS, AUTO

__all__ = ["Keeping", "kept_bytes", "set_keeping"]

_SPARE = 0.1  # of what is free: fragments, and what others begin meanwhile
_MOMENTS = 8  # bytes a trained parameter: AdamW's two, which are made after the first batch


def set_keeping(model: nn.Module, keep_effective: str) -> None:
    """Tells the sparse layers of ``model`` to keep effective weights always, never, or (auto) as `Keeping` decides.

    Args:
        model: with a sparse adapter; in another nothing is kept, whatever is asked.
        keep_effective: see `sparse_ft.settings.lora.LoraSettings`.
    """
    for layer in _layers(model):
        layer.keep_effective, layer.keeps = keep_effective, keep_effective == ALWAYS


def kept_bytes(model: nn.Module) -> int:
    """What a training step of ``model`` holds more at its peak, at most, where all effective weights are kept.

    Of blocks under gradient checkpointing one at a time keeps them, while it is run again.
    """
    sizes = {id(layer): layer.masked_parameter.numel() * layer.masked_parameter.element_size()
             for layer in _layers(model) if layer.makes_effective}  # fmt: skip
    blocks = [sum(sizes.pop(id(part), 0) for part in module.modules()) for module in model.modules()
              if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing]  # fmt: skip
    return sum(sizes.values()) + max(blocks, default=0)


class Keeping:
    """Decides ``auto`` for one training: the device is asked once, after the first batch, which is run without.

    What that batch took at its peak is what activations take: the Trainer puts the longest batch first. Where the kept
    weights fit beside it, and a tenth of the free memory stays, they are kept from then on. On a CPU a process that
    has a share of the cores, as a worker beside others has, counts on that share of the free memory.

    Args:
        model: about to be trained, on ``device``; peaks are counted from now on (`sparse_ft.memory.reset_peak`).
        device: that holds it.
        say: takes a line that says what was chosen, and why.
    """

    def __init__(self, model: nn.Module, device: torch.device, say: Callable[[str], None] = lambda line: None):
        self._model, self._device, self._say = model, device, say
        self._layers = [layer for layer in _layers(model) if layer.makes_effective]
        self._open = [layer for layer in self._layers if layer.keep_effective == AUTO]

    @property
    def chosen(self) -> str | None:
        """``kept`` or ``made again``; None of a model that makes no effective weights."""
        if not self._layers:
            return None
        return "kept" if all(layer.keeps for layer in self._layers) else "made again"

    def after_batch(self) -> None:
        """Decides, once; to be called between two batches of the training."""
        if not self._open:
            return
        keep, line = self._ask()
        for layer in self._open:
            layer.keeps = keep
        self._open = []
        self._say(line)

    def end(self) -> None:
        """Leaves the layers as they were before the training."""
        for layer in self._layers:
            layer.keeps = layer.keep_effective == ALWAYS

    def _ask(self) -> tuple[bool, str]:
        device = self._device
        trained = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
        batch = peak_bytes(device) - held_bytes(device) + _MOMENTS * trained
        free = free_bytes(device)
        if device.type != "cuda":
            free = int(free * min(1.0, torch.get_num_threads() / cores()))
        takes = kept_bytes(self._model)
        keep = takes + batch <= (1 - _SPARE) * free
        done = "are kept for backward" if keep else "are made again in backward"
        return keep, (
            f"effective weights {done} (keep_effective auto): {takes / 1e9:.2f} GB of them and {batch / 1e9:.2f} GB for"
            f" a batch, of {free / 1e9:.2f} GB that are free"
        )


def _layers(model: nn.Module) -> list[MaskedBase]:
    return [module for module in model.modules() if isinstance(module, MaskedBase)]
