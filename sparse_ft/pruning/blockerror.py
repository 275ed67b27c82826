"""How far pruning moves what a block gives out, of text that goes through it anyway."""

from __future__ import annotations

import torch

from sparse_ft.models.blocks import HiddenStates

__all__ = ["FirstOutputs", "output_error"]

_TOKENS = 8192  # whose outputs are kept: less than a block's weights and what pruning gathers about it


def output_error(inputs: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor) -> tuple[float, float]:
    """||pruned - dense||^2 and ||dense - inputs||^2.

    Their ratio is 0 for a block that pruning left as it was, and 1 for one that is as far from it as no block at all.
    What passes the block by, on the residual path, is in neither: it is the same before and after, and often far
    larger.

    Args:
        inputs: float ``[..., H]``, what enters a block.
        dense: what leaves it with its dense weights.
        pruned: what leaves it with its pruned ones.
    """
    base = dense.float()
    apart, added = (pruned.float() - base, base - inputs.float())
    return float(apart.square().sum(dtype=torch.float64)), float(added.square().sum(dtype=torch.float64))


class FirstOutputs:
    """What leaves a block of the first samples, kept on its device: a target of `BlockModel.run`.

    Attributes:
        samples: how many those are: as many as have 8,192 tokens, at least one.
    """

    def __init__(self, samples: int, seq_len: int):
        self.samples = min(samples, max(1, _TOKENS // seq_len))
        self._parts: list[tuple[slice, torch.Tensor]] = []

    def write(self, samples: slice, values: torch.Tensor) -> None:
        if samples.start < self.samples:
            self._parts.append((slice(samples.start, min(samples.stop, self.samples)), values))

    def error(self, inputs: HiddenStates, pruned: HiddenStates) -> float:
        """The ratio of `output_error`, of what entered the block and what leaves it now."""
        apart = added = 0.0
        for samples, dense in self._parts:
            dense = dense[: samples.stop - samples.start]
            parts = output_error(inputs.read(samples, dense.device), dense, pruned.read(samples, dense.device))
            apart, added = apart + parts[0], added + parts[1]
        return apart / max(added, torch.finfo(torch.float32).tiny)
