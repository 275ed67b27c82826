"""The loss on the right answers alone: what `evaluate` calls ``loss``, without the rest of the scores."""

from __future__ import annotations

import math

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from transformers import PreTrainedTokenizerBase

from sparse_ft.evaluation.prepared import prepared
from sparse_ft.evaluation.scorer import Scorer
from sparse_ft.evaluation.standard_errors import ratio_standard_error
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.tasks.examples import gold_continuation, gold_index

__all__ = ["answer_loss"]


def answer_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: ScoringSettings | None = None,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """``loss`` and ``loss_stderr`` as `evaluate` measures them, on the same questions, from the right answers alone.

    A quarter of the work where a question has four choices, and no text is generated. The last digits may differ
    from `evaluate`'s, because other rows share a batch.

    Takes what `evaluate` takes.

    Returns:
        nothing for tasks without right answers (rolling log-likelihoods).
    """
    settings = settings or ScoringSettings()
    chat = settings.chat_template
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {}
    with prepared(model, task, settings.num_fewshot):
        scorer = Scorer(model, tokenizer, settings.eval_batch_size, progress)
        scorer.stage = f"answer loss {task.config.task}"
        task.build_all_requests(
            limit=settings.eval_limit, rank=0, world_size=1, **scorer.chat_arguments(settings.chat_template)
        )
        pairs: dict[int, tuple[str, str]] = {}
        for request in task.instances:
            if task.OUTPUT_TYPE == "generate_until":
                pairs.setdefault(request.doc_id, (request.args[0], gold_continuation(task, request.doc, chat)))
            elif task.OUTPUT_TYPE != "multiple_choice" or request.idx == gold_index(task, request.doc):
                pairs.setdefault(request.doc_id, tuple(request.args))
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs.values())]
        losses = [-likelihood for likelihood, _ in scorer.loglikelihood(requests)]
        tokens = [len(scorer.tok_continuation(context, answer)) for context, answer in pairs.values()]
    metrics = {"loss": math.fsum(losses) / sum(tokens), "loss_stderr": ratio_standard_error(losses, tokens)}
    return {name: value for name, value in metrics.items() if not math.isnan(value) or name == "loss"}
