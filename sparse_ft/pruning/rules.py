"""The functions that `sparse_ft.settings.rules` names, and what those that work on whole matrices are given."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Inputs", "load"]

T = TypeVar("T")


class Inputs:
    """What calibration text says of the inputs of a matrix, and of all that share them (query, key and value).

    Attributes:
        hessian: X^T X over the tokens, float32 ``[C, C]``, not to be modified; None where no token came.
        tokens: how many came.
        columns: C.
        device: of the computation.
        note: takes a remark for the metadata, which names the matrix.
    """

    def __init__(
        self,
        hessian: torch.Tensor | None,
        tokens: int,
        columns: int,
        device: torch.device,
        note: Callable[[str], None],
    ) -> None:
        self.hessian, self.tokens, self.columns = hessian, tokens, columns
        self.device, self.note = device, note
        self._derived: dict[Callable, Any] = {}

    def once(self, derive: Callable[[Inputs], T]) -> T:
        """``derive(self)``, computed once for all matrices with these inputs (a factorisation, say)."""
        if derive not in self._derived:
            self._derived[derive] = derive(self)
        return self._derived[derive]


def load(function: str | Callable) -> Callable:
    """The function of a row: ``module:function`` of this package; one that was given itself stays."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(f"sparse_ft.pruning.{module}"), name)
