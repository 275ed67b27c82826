"""The adapters' parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sparse_ft.errors import UserError
from sparse_ft.settings import shared
from sparse_ft.settings.field import Settings, setting

__all__ = ["ALWAYS", "AUTO", "KEEPING", "NEVER", "LoraSettings", "projections_text", "read_projections"]

AUTO, ALWAYS, NEVER = KEEPING = ("auto", "always", "never")


def read_projections(text: str) -> tuple[str, ...] | None:
    """Projections as people list them, ``q_proj, v_proj``, sorted and each once; None for ``all``.

    Raises:
        UserError: an empty name.
    """
    names = sorted({name.strip() for name in text.split(",")})
    if "" in names:
        raise UserError(f"target_modules is '{text}'; list projections such as q_proj,v_proj, or write all.")
    return None if names == ["all"] else tuple(names)


def projections_text(names: Collection[str] | None) -> str:
    """The list that `read_projections` reads back."""
    return "all" if names is None else ",".join(sorted(names))


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Rank, scaling and places of an adapter.

    ``target_modules`` are projections by the names in the family's row (Mixtral's experts have ``w1``, ``w2`` and
    ``w3``); None adapts every prunable one. Experts take no dropout. ``rounding`` is that of ``W + s B A``,
    in the sparse forward and in every merge.
    """

    lora_r: int = setting(16, "rank of the adapters.", least=1)
    lora_alpha: float = setting(32.0, "the adapters are scaled by lora_alpha / lora_r.", time=False)
    rslora: bool = setting(
        False, "scale the adapters by lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA).", time=False, later=True
    )
    lora_dropout: float = setting(0.0, "dropout on the adapters' input.")
    target_modules: tuple[str, ...] | None = setting(
        None,
        "projections to adapt, comma-separated, or all prunable ones.",
        read=read_projections,
        write=projections_text,
    )
    rounding: str = shared.rounding()
    keep_effective: str = setting(
        AUTO,
        "whether the weights that sparse_to_sparse computes with, (W + s B A) . M, stay in memory from forward to"
        " backward or are made again there: always, never, or where the device has the room (auto asks after the first"
        " batch). The same bits either way.",
        choices=KEEPING,
        result=False,
    )

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        if not 0 < self.lora_alpha < math.inf:
            yield f"lora_alpha is {self.lora_alpha}; it must be above 0."
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)."
