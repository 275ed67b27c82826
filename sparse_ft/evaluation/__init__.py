"""How good a model is: lm-eval's scores on a task, the loss on its answers, and perplexity of held-out text."""

from sparse_ft.evaluation.answers import answer_loss
from sparse_ft.evaluation.finite import NonFiniteScoresError
from sparse_ft.evaluation.perplexity import perplexity
from sparse_ft.evaluation.scores import Evaluation, EvaluationSettings, evaluate

__all__ = ["Evaluation", "EvaluationSettings", "NonFiniteScoresError", "answer_loss", "evaluate", "perplexity"]
