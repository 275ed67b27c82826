"""A checkpoint of any kind, by its path."""

from __future__ import annotations

from pathlib import Path

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.folder import is_packed
from sparse_ft.models.packed import PackedCheckpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a Hugging Face folder, or a packed one or a Cerebras ``.mdl`` file seen as one.

    Raises:
        UserError: none of them.
    """
    if Path(path).suffix == ".mdl":
        from sparse_ft.models.cerebras.checkpoint import CerebrasCheckpoint

        return CerebrasCheckpoint(path)
    if is_packed(path):
        return PackedCheckpoint(path)
    return Checkpoint(path)
