"""A checkpoint of either kind, by its path."""

from __future__ import annotations

from pathlib import Path

from sparse_ft.models.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a Hugging Face folder, or a Cerebras ``.mdl`` file seen as one.

    Raises:
        UserError: neither.
    """
    if Path(path).suffix == ".mdl":
        from sparse_ft.models.cerebras.checkpoint import CerebrasCheckpoint

        return CerebrasCheckpoint(path)
    return Checkpoint(path)
