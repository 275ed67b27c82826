"""Scores of a model on a task: lm-eval's metrics, the loss on the answers, perplexity, and the protocol."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
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
from sparse_ft.evaluation.scorer import Scorer
from sparse_ft.evaluation.standard_errors import ratio_standard_error
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.tasks.definitions import task_protocol
from sparse_ft.tasks.examples import gold_continuation, gold_index

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
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)


@one_process()
def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: ScoringSettings | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Scores ``model`` on ``task`` with lm-eval, as its command line would score the saved checkpoint.

    No chat template is applied, decoding is greedy, and few-shot examples are drawn with lm-eval's default
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

    Raises:
        UserError: a setting is out of range, or the perplexity corpus cannot be had.
        NonFiniteScoresError: the model's logits, or a score, are NaN or infinite, or above every float.
    """
    settings = settings or ScoringSettings()
    settings.check()
    name = task.config.task
    corpus, texts = corpus_texts(settings.perplexity_corpus, task)
    with prepared(model, task, settings.num_fewshot):
        scorer = Scorer(model, tokenizer, settings.eval_batch_size, progress, settings.share_contexts)
        scorer.stage = f"scoring {name}"
        with finite(name):
            results = lm_eval.evaluator.evaluate(scorer, {"tasks": {name: task}}, limit=settings.eval_limit)
        # One record per filter; each filter sees the same answers.
        every = results["samples"][name]
        samples = [sample for sample in every if sample["filter"] == every[0]["filter"]]
        metrics = _metrics(results["results"][name])
        metrics["samples_per_second"] = len(samples) / scorer.seconds
        losses, tokens = _answer_losses(scorer, task, samples)
        if losses:
            metrics["loss"] = math.fsum(losses) / sum(tokens)
            metrics["loss_stderr"] = ratio_standard_error(losses, tokens)
        headline = next((key for key in _HEADLINES if key in metrics), None)
        if headline is not None:
            metrics["accuracy"] = metrics[headline]
            if f"{headline}_stderr" in metrics:
                metrics["accuracy_stderr"] = metrics[f"{headline}_stderr"]
        protocol = {
            **task_protocol(task),
            "limit": settings.eval_limit,
            "samples": len(samples),
            "questions_sha256": _questions(samples),
            "accuracy_metric": headline,
            "chance": _chance(task, samples),
            "majority": _majority(task, samples),
            "loss_tokens": sum(tokens),
            "batch_size": scorer.batch_sizes_used[-1] if scorer.batch_sizes_used else scorer.batch_size,
            "shared_contexts": scorer.shares_contexts,
            "max_length": scorer.max_length,
            "fewshot_seed": DEFAULT_OTHER_SEED,
            "chat_template": None,
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
    return Evaluation(check_metrics(metrics), protocol, every if settings.keep_samples else [])


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """lm-eval's ``"acc_stderr,none"`` and its like as plain names; what is no number is left out."""
    metrics = {}
    for key, value in results.items():
        name, comma, filtering = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue
        stderr = name.endswith("_stderr")
        parts = [name.removesuffix("_stderr"), "" if filtering == "none" else filtering.replace("-", "_")]
        plain = "_".join(filter(None, [*parts, "stderr" if stderr else ""]))
        # Lambada's own "perplexity" is of its last words; ours is of running text.
        metrics[f"task_{plain}" if name.startswith(("loss", "perplexity")) else plain] = float(value)
    return metrics


def _answer_losses(scorer: Scorer, task: Task, samples: list[dict[str, Any]]) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (nats) of every right answer, and its tokens."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [], []
    pairs, likelihoods = [], []
    for sample in samples:
        if task.OUTPUT_TYPE == "generate_until":
            pairs.append((sample["arguments"][0][0], gold_continuation(task, sample["doc"])))
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


def _questions(samples: list[dict[str, Any]]) -> str:
    """16 hex digits of everything that was asked and what was right, in order: the rows themselves may lie in other
    columns on the hub than in a file, and may change there."""
    identity = hashlib.sha256()
    for sample in samples:
        asked = [sample["arguments"], sample["target"]]
        identity.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return identity.hexdigest()[:16]


def _chance(task: Task, samples: list[dict[str, Any]]) -> float | None:
    """Expected accuracy of guessing: mean of 1 / choices; None where there are no choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return math.fsum(1 / len(task.doc_to_choice(sample["doc"])) for sample in samples) / len(samples)


def _majority(task: Task, samples: list[dict[str, Any]]) -> float | None:
    """Accuracy of always giving the commonest right answer; None where the questions have choices of their own."""
    if _chance(task, samples) is None or len({tuple(task.doc_to_choice(s["doc"])) for s in samples}) != 1:
        return None
    answers = Counter(gold_index(task, sample["doc"]) for sample in samples)
    return answers.most_common(1)[0][1] / len(samples)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
