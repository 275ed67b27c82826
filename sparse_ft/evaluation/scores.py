"""Scores of a model on a task: lm-eval's metrics, the loss on the answers, perplexity, and the protocol."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lm_eval.evaluator
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from transformers import PreTrainedTokenizerBase

from sparse_ft.environment import arithmetic_variables, one_process
from sparse_ft.evaluation.finite import check_metrics, finite
from sparse_ft.evaluation.perplexity import corpus_texts, perplexity
from sparse_ft.evaluation.prepared import prepared
from sparse_ft.evaluation.records import chance, first_filter, headline, majority, plain_metrics, questions_digest
from sparse_ft.evaluation.scorer import Scorer
from sparse_ft.evaluation.standard_errors import ratio_standard_error
from sparse_ft.evaluation.suite import SuiteScores, score_suite
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.tasks.definitions import task_protocol
from sparse_ft.tasks.examples import chat_template_of, gold_continuation, gold_index
from sparse_ft.tasks.suite import ScoredTask

__all__ = ["Evaluation", "evaluate"]

# Which of a task's metrics is called "accuracy": the first of these it has. acc_norm is what papers give
# for HellaSwag and ARC, strict exact match for GSM8K.
_HEADLINES = ("acc_norm", "acc", "exact_match_strict_match", "exact_match")


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        metrics: ``accuracy`` and ``accuracy_stderr`` (the headline metric, named in the protocol), every
            metric of lm-eval under its own name with ``_stderr`` (``acc``, ``acc_norm``,
            ``exact_match_strict_match``, ``exact_match_flexible_extract``), ``loss`` (nats per token of the
            right answers) with ``loss_stderr`` (over questions), ``perplexity`` and ``perplexity_loss`` with
            theirs (over windows), ``samples_per_second``. What could not be measured (a standard error of one
            sample, a perplexity above every float) is not there, and no metric is NaN or infinite.
        protocol: what the numbers depend on, JSON-able.
        samples: lm-eval's record of every question, JSON-able; empty unless asked for.
        suite: of the tasks scored beside it, what is not in metrics and protocol; None where there were none.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)
    suite: SuiteScores | None = None


@one_process()
def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: ScoringSettings | None = None,
    progress: Progress = SILENT,
    suite: Sequence[ScoredTask] = (),
) -> Evaluation:
    """Scores ``model`` on ``task`` with lm-eval, as its command line would score the saved checkpoint.

    A chat template is applied only where the settings say so (few-shot examples are turns of their own then, as on
    lm-eval's command line), decoding is greedy, and few-shot examples are drawn with lm-eval's default
    seed. The same model, task and settings give the same numbers on the same device.

    ``loss`` is the mean over all tokens of all right answers of their negative log-likelihood given the
    scored prompt: for multiple choice out of lm-eval's own log-likelihoods, for generative tasks by one
    more pass over prompt and right answer.

    Args:
        model: a causal language model (or a PeftModel of one); its train/eval mode is left as it was.
        tokenizer: its tokenizer, not changed.
        task: from :func:`sparse_ft.tasks.definitions.load_task`.
        settings: see `ScoringSettings`.
        progress: told the requests done.
        suite: what else is scored; see `sparse_ft.evaluation.suite.score_suite`.

    Raises:
        UserError: a setting is out of range, the perplexity corpus cannot be had, or there is no chat template.
        NonFiniteScoresError: the model's logits, or a score, are NaN or infinite, or above every float.
    """
    settings = settings or ScoringSettings()
    settings.check()
    settings = settings.settled()
    name = task.config.task
    template = chat_template_of(tokenizer, "the model") if settings.chat_template else None
    corpus, texts = corpus_texts(settings.perplexity_corpus, task)
    with prepared(model, task, settings.num_fewshot):
        scorer = Scorer(model, tokenizer, settings.eval_batch_size, progress, settings.share_contexts)
        scorer.stage = f"scoring {name}"
        with finite(name):
            results = lm_eval.evaluator.evaluate(
                scorer,
                {"tasks": {name: task}},
                limit=settings.eval_limit,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
        shots = task.config.num_fewshot or 0
        every = results["samples"][name]
        samples = first_filter(every)
        metrics = plain_metrics(results["results"][name])
        metrics["samples_per_second"] = len(samples) / scorer.seconds
        losses, tokens = _answer_losses(scorer, task, samples, settings.chat_template)
        if losses:
            metrics["loss"] = math.fsum(losses) / sum(tokens)
            metrics["loss_stderr"] = ratio_standard_error(losses, tokens)
        metric = headline(metrics, _HEADLINES)
        protocol = {
            **task_protocol(task),
            "limit": settings.eval_limit,
            "samples": len(samples),
            "questions_sha256": questions_digest(samples),
            "accuracy_metric": metric,
            "chance": chance(task, samples),
            "majority": majority(task, samples),
            "loss_tokens": sum(tokens),
            "batch_size": scorer.batch_sizes_used[-1] if scorer.batch_sizes_used else scorer.batch_size,
            "shared_contexts": scorer.shares_contexts,
            "max_length": scorer.max_length,
            "fewshot_seed": DEFAULT_OTHER_SEED,
            "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16],
            "device": _device_name(scorer.device),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            **arithmetic_variables(),
        }
        if settings.perplexity_tokens != 0:
            rows = None if settings.eval_batch_size == "auto" else settings.eval_batch_size
            found = perplexity(
                model, tokenizer, texts, settings.perplexity_seq_len, settings.perplexity_tokens, rows, progress
            )
            if math.isfinite(found.value):
                metrics.update(perplexity=found.value, perplexity_stderr=found.stderr)
            else:
                protocol["perplexity_absent"] = "exp(perplexity_loss) is above every number"
            metrics.update(perplexity_loss=found.loss, perplexity_loss_stderr=found.loss_stderr)
            protocol.update(perplexity_corpus=corpus, perplexity_seq_len=found.seq_len)
            protocol.update(perplexity_windows=found.windows, perplexity_tokens=found.tokens)
    beside = None
    if suite:
        known = {(name, shots): results} if settings.limit_beside == settings.eval_limit else {}
        beside = score_suite(model, tokenizer, suite, settings, progress, known)
        metrics |= beside.metrics
        protocol |= beside.protocol
    return Evaluation(check_metrics(metrics), protocol, every if settings.keep_samples else [], beside)


def _answer_losses(
    scorer: Scorer, task: Task, samples: list[dict[str, Any]], chat: bool
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (nats) of every right answer, and its tokens."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [], []
    pairs, likelihoods = [], []
    for sample in samples:
        if task.OUTPUT_TYPE == "generate_until":
            pairs.append((sample["arguments"][0][0], gold_continuation(task, sample["doc"], chat)))
        else:
            index = gold_index(task, sample["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else 0
            pairs.append(tuple(sample["arguments"][index]))
            likelihoods.append(sample["filtered_resps"][index][0])
    if task.OUTPUT_TYPE == "generate_until":
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        scorer.stage = f"answer loss {task.config.task}"
        likelihoods = [likelihood for likelihood, _ in scorer.loglikelihood(requests)]
    tokens = [len(scorer.tok_continuation(context, answer)) for context, answer in pairs]
    return [-likelihood for likelihood in likelihoods], tokens


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
