"""Sparse fine-tuning of language models, tracked from mask to merged checkpoint."""

from sparse_ft.lazy import public

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = public(__name__, {
    "Calibration": "sparse_ft.pruning.calibration",
    "Checkpoint": "sparse_ft.models.checkpoint",
    "LoraSettings": "sparse_ft.settings.lora",
    "MaskGenerator": "sparse_ft.pruning.generator",
    "MaskSet": "sparse_ft.masks.mask_set",
    "PruningSettings": "sparse_ft.settings.pruning",
    "ScoringSettings": "sparse_ft.settings.scoring",
    "UserError": "sparse_ft.errors",
    "apply_masks": "sparse_ft.models.loading",
    "apply_sparse_lora": "sparse_ft.lora.model",
    "evaluate": "sparse_ft.evaluation.scores",
    "from_packed": "sparse_ft.models.loading",
    "load_masks": "sparse_ft.masks.files",
    "load_model": "sparse_ft.models.loading",
    "load_sparse_lora": "sparse_ft.lora.model",
    "load_task": "sparse_ft.tasks.definitions",
    "merge_all_lora_weights": "sparse_ft.lora.merge",
    "open_checkpoint": "sparse_ft.models.opening",
    "pack_checkpoint": "sparse_ft.models.packing",
    "save_masks": "sparse_ft.masks.files",
    "save_model": "sparse_ft.models.loading",
    "shrink_checkpoint": "sparse_ft.pruning.shrink",
    "unpack_checkpoint": "sparse_ft.models.packing",
    "validate_checkpoint": "sparse_ft.validation",
    "validate_sparsity_preserved": "sparse_ft.lora.model",
    "write_analysis": "sparse_ft.analysis.write",
})  # fmt: skip
