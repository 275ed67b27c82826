"""A weight that backward makes again: what others save of it is a recipe, for modules that use it in their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Remade"]


class _View(NamedTuple):
    """Where a tensor lies in the weight of ``owner``."""

    owner: Remade
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Remade(saved_tensors_hooks):
    """Inside, autograd saves no view of `weight`: backward makes it once more, and lets go of it when it is through.

    Other tensors go the way they would go without: autograd asks the innermost hooks alone, so those outside (of
    non-reentrant checkpointing, of another weight) are handed on to.

    Args:
        make: the weight again, to the bit, in the same layout.
    """

    def __init__(self, make: Callable[[], Tensor]):
        super().__init__(self._pack, self._unpack)
        self._make = make
        self._storage: int | None = None
        self._again: Tensor | None = None

    def __enter__(self) -> None:
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        super().__enter__()

    def watch(self, weight: Tensor) -> Tensor:
        """Takes note of the weight, which lives as long as this is open, and returns it."""
        self._storage = weight.untyped_storage().data_ptr()
        if weight.requires_grad:
            weight.register_hook(self._release)  # its gradient is complete: whoever used it has been through
        return weight

    def _release(self, gradient: Tensor) -> None:
        self._again = None

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() == self._storage:
            return _View(self, tensor.shape, tensor.stride(), tensor.storage_offset())
        return tensor if self._outer is None else self._outer[0](tensor)

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _View) and saved.owner is self:
            if self._again is None:
                self._again = self._make()
            return self._again.as_strided(saved.size, saved.stride, saved.offset)
        return saved if self._outer is None else self._outer[1](saved)
