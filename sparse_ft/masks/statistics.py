"""How sparse a set of masks is, as plain numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_ft.masks.mask_set import MaskSet

__all__ = ["block_sparsities", "mask_statistics", "statistics_of_counts"]


def mask_statistics(masks: MaskSet) -> dict[str, Any]:
    """Statistics of a mask set; see `statistics_of_counts`."""
    kept = {name: masks.kept(name) for name in masks}
    return statistics_of_counts(masks.shapes, kept, masks.metadata, masks.checksum)


def statistics_of_counts(
    shapes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, int],
    metadata: Mapping[str, Any],
    checksum: str,
) -> dict[str, Any]:
    """Statistics from the number of kept weights per tensor.

    Returns:
        ``sparsity`` (asked, None if the masks do not say; achieved), ``weights`` and ``pruned`` over all
        tensors, ``per_tensor`` (count of tensors; min, mean, max of their sparsities, every tensor counting
        once), ``tensors`` (by name: shape, weights, pruned, sparsity), ``checksum`` and ``metadata``.
        JSON-able.
    """
    tensors = {}
    for name in sorted(shapes):
        weights = int(np.prod(shapes[name], dtype=np.int64))
        pruned = weights - kept[name]
        tensors[name] = {
            "shape": list(shapes[name]),
            "weights": weights,
            "pruned": pruned,
            "sparsity": pruned / weights if weights else 0.0,
        }
    weights = sum(entry["weights"] for entry in tensors.values())
    pruned = sum(entry["pruned"] for entry in tensors.values())
    each = [entry["sparsity"] for entry in tensors.values()] or [0.0]
    return {
        "sparsity": {"asked": metadata.get("sparsity"), "achieved": pruned / weights if weights else 0.0},
        "weights": weights,
        "pruned": pruned,
        "per_tensor": {
            "count": len(tensors),
            "min": min(each),
            "mean": float(np.mean(each)),
            "max": max(each),
        },
        "tensors": tensors,
        "checksum": checksum,
        "metadata": dict(metadata),
    }


def block_sparsities(statistics: Mapping[str, Any]) -> list[float]:
    """Sparsity of every block, in order, each weight counting once. The first number in a name is its block."""
    weights: dict[int, int] = {}
    pruned: dict[int, int] = {}
    for name, entry in statistics["tensors"].items():
        number = re.search(r"\.(\d+)\.", name)
        block = int(number.group(1)) if number else 0
        weights[block] = weights.get(block, 0) + entry["weights"]
        pruned[block] = pruned.get(block, 0) + entry["pruned"]
    return [pruned[block] / max(weights[block], 1) for block in sorted(weights)]
