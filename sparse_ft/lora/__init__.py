"""LoRA that keeps a pruned model pruned: masked training on PEFT, and an exact merge.

The names below are looked up when they are first used: `sparse_ft.lora.function` and the settings must
import where PEFT and transformers are absent.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LoraSettings": "config",
    "SparseLoRAConfig": "peft_config",
    "SparseLoRALayer": "layer",
    "apply_sparse_lora": "model",
    "load_sparse_lora": "model",
    "merge_all_lora_weights": "merge",
    "remask": "model",
    "validate_sparsity_preserved": "model",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
