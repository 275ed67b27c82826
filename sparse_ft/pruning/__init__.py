"""Scores of weights, and masks of exactly the asked sparsity, under the names that users of the precursor know."""

from sparse_ft.lazy import public

__getattr__, __dir__, __all__ = public(__name__, {
    "Calibration": "sparse_ft.pruning.calibration",
    "MaskGenerator": "sparse_ft.pruning.generator",
    "PruningSettings": "sparse_ft.settings.pruning",
    "compute_random_mask": "sparse_ft.pruning.patterns",
    "compute_sparsity_stats": "sparse_ft.masks.statistics:mask_statistics",
    "compute_structured_mask": "sparse_ft.pruning.patterns",
    "compute_unstructured_mask": "sparse_ft.pruning.patterns",
    "load_mask": "sparse_ft.masks.files:load_masks",
    "plot_sparsity_histogram": "sparse_ft.masks.figures:save_histogram",
    "save_mask": "sparse_ft.masks.files:save_masks",
    "validate_mask": "sparse_ft.masks.checks:check_masks",
})  # fmt: skip
