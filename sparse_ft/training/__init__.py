"""Fine-tuning: the Hugging Face Trainer with what a pruned model needs, and recovery on text under its mask."""

from sparse_ft.lazy import public

__getattr__, __dir__, __all__ = public(__name__, {
    "AnswerCollator": "sparse_ft.training.collator",
    "NonFiniteLossError": "sparse_ft.training.watch",
    "TrainingResult": "sparse_ft.training.watch",
    "TrainingSettings": "sparse_ft.settings.training",
    "train": "sparse_ft.training.trainer",
})  # fmt: skip
