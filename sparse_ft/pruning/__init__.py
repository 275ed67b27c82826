"""Scores of weights, and masks of exactly the asked sparsity.

The names that users of the precursor know are importable from here; each is loaded when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Calibration": ("sparse_ft.pruning.settings", "Calibration"),
    "MaskGenerator": ("sparse_ft.pruning.generator", "MaskGenerator"),
    "PruningSettings": ("sparse_ft.pruning.settings", "PruningSettings"),
    "compute_random_mask": ("sparse_ft.pruning.patterns", "compute_random_mask"),
    "compute_sparsity_stats": ("sparse_ft.masks.statistics", "mask_statistics"),
    "compute_structured_mask": ("sparse_ft.pruning.patterns", "compute_structured_mask"),
    "compute_unstructured_mask": ("sparse_ft.pruning.patterns", "compute_unstructured_mask"),
    "load_mask": ("sparse_ft.masks.files", "load_masks"),
    "plot_sparsity_histogram": ("sparse_ft.masks.figures", "save_histogram"),
    "save_mask": ("sparse_ft.masks.files", "save_masks"),
    "validate_mask": ("sparse_ft.masks.checks", "check_masks"),
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)
