"""Text that importances look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_ft.errors import UserError

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Text that importances look at.

    Attributes:
        token_ids: int64 ``[samples, seq_len]``, without padding.
        description: what it is (task, samples, length, seed); goes into the masks' metadata.
    """

    token_ids: torch.Tensor
    description: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError if the ids are not int64 ``[samples >= 1, seq_len >= 2]``."""
        ids = self.token_ids
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise UserError(
                f"Calibration data must be int64 [samples, seq_len] with at least 1 x 2 tokens, not {ids.dtype}"
                f" {list(ids.shape)}. Give more text, or a smaller calibration_seq_len."
            )
