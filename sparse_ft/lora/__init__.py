"""LoRA that keeps a pruned model pruned: masked training on PEFT, and an exact merge.

`sparse_ft.lora.function` and the settings import where PEFT and transformers are absent.
"""

from sparse_ft.lazy import public

__getattr__, __dir__, __all__ = public(__name__, {
    "LoraSettings": "sparse_ft.settings.lora",
    "SparseLoRAConfig": "sparse_ft.lora.peft_config",
    "SparseLoRALayer": "sparse_ft.lora.layer",
    "apply_sparse_lora": "sparse_ft.lora.model",
    "load_sparse_lora": "sparse_ft.lora.model",
    "merge_all_lora_weights": "sparse_ft.lora.merge",
    "remask": "sparse_ft.lora.model",
    "validate_sparsity_preserved": "sparse_ft.lora.model",
})  # fmt: skip
