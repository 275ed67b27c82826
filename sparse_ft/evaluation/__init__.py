"""How good a model is: lm-eval's scores on a task, the loss on its answers, and perplexity of held-out text."""

from sparse_ft.lazy import public

__getattr__, __dir__, __all__ = public(__name__, {
    "Evaluation": "sparse_ft.evaluation.scores",
    "NonFiniteScoresError": "sparse_ft.evaluation.finite",
    "ScoringSettings": "sparse_ft.settings.scoring",
    "answer_loss": "sparse_ft.evaluation.answers",
    "evaluate": "sparse_ft.evaluation.scores",
})  # fmt: skip
