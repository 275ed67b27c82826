"""Which tensors of a checkpoint masks cover, which they leave, and why."""

from __future__ import annotations

import math
from typing import Any

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import Architecture, architecture_of

__all__ = ["coverage_report"]


def coverage_report(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tensors that masks cover, tensors left and why, and the covered fraction of all parameters.

    Returns:
        ``parameters``, ``prunable``, ``prunable_fraction``; ``tensors_covered`` (name -> weights);
        ``tensors_left`` (reason -> ``{"tensors": count, "parameters": n, "names": [...]}``); ``tensors_carried``,
        the names that the model has no place for, which count nowhere. JSON-able.
    """
    sizes = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names}
    covered = set(checkpoint.prunable)
    row = architecture_of(checkpoint.config)
    left: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names:
        if name not in covered:
            entry = left.setdefault(_reason(row, name), {"tensors": 0, "parameters": 0, "names": []})
            entry["tensors"] += 1
            entry["parameters"] += sizes[name]
            entry["names"].append(name)
    total, prunable = sum(sizes.values()), sum(sizes[name] for name in covered)
    return {
        "parameters": total,
        "prunable": prunable,
        "prunable_fraction": prunable / total if total else 0.0,
        "tensors_covered": {name: sizes[name] for name in sorted(covered)},
        "tensors_left": left,
        "tensors_carried": checkpoint.carried,
    }


def _reason(row: Architecture, name: str) -> str:
    words = name.split(".")  # so that nothing is matched inside a longer word
    marks_of = {
        "embedding": (row.embedding,),
        "output head": (row.head,),
        "norm": row.norms,
        "bias": ("bias",),
        "router": () if row.experts is None else (row.experts.router, *row.experts.weighers),
    }
    for reason, marks in marks_of.items():
        if any(mark in words for mark in marks):
            return reason
    return "not a linear map of a decoder block"
