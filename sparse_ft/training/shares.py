"""Training by a group of processes: each reads its rows of every batch, and all take the step that one would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sparse_ft.models.sharding import is_sharded
from sparse_ft.training.collator import IGNORED

__all__ = ["Shares", "clip_gradients", "shares_of"]


@dataclass(frozen=True)
class Shares:
    """Who reads which rows of a batch. Sharded parameters take the mean of the processes' gradients.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Every ``size``-th row of a batch; where there are fewer rows than processes, a row of which nothing counts.

        The padding stays that of the whole batch.
        """
        if self.size == 1:
            return dict(batch)
        own = {n: v[self.rank :: self.size] if isinstance(v, Tensor) else v for n, v in batch.items()}
        if len(own["labels"]):
            return own
        spare = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
        return spare | {"labels": torch.full_like(spare["labels"], IGNORED)}

    def own(self, loss: Tensor) -> Tensor:
        """The loss to be differentiated, of this process's part of the sum: the mean of all of them is the sum."""
        return loss * self.size if self.size > 1 else loss

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, the same in each."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return value
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return max(found)


def shares_of(model: nn.Module) -> Shares:
    """All rows for this process, unless the model is spread over several."""
    return Shares(dist.get_rank(), dist.get_world_size()) if is_sharded(model) else Shares()


def clip_gradients(model: nn.Module, longest: float) -> Tensor:
    """Scales the gradients of a sharded model down to a length, and returns the one that they had.

    Those of adapters are small: they are gathered one by one to be measured, which gives one process's length to the
    bit. Those of all weights are measured where they lie, and the last digit may differ.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    if len(parameters) < len(list(model.parameters())):
        norm = torch.linalg.vector_norm(torch.stack([get_total_norm([_whole(gradient)]) for gradient in gradients]))
    else:
        norm = _whole(get_total_norm(gradients))
    clip_grads_with_norm_(parameters, longest, norm)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
