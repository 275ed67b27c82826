"""Scores on tasks beside the one that was trained, as papers give them: each of its own, and their mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lm_eval.evaluator
import torch
from transformers import PreTrainedTokenizerBase

from sparse_ft.evaluation.finite import finite
from sparse_ft.evaluation.prepared import prepared
from sparse_ft.evaluation.records import chance, first_filter, headline, plain_metrics, questions_digest
from sparse_ft.evaluation.scorer import Scorer
from sparse_ft.progress import Progress
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.tasks.definitions import eval_split
from sparse_ft.tasks.suite import ScoredTask

__all__ = ["SuiteScores", "score_suite"]

# Which of a task's metrics is its "accuracy" here: the first of these. The tables of pruning papers (SparseGPT, Wanda,
# OWL, ALPS) give lm-eval's acc, of HellaSwag and ARC too.
_PAPERS = ("acc", "acc_norm", "exact_match_strict_match", "exact_match")


@dataclass
class SuiteScores:
    """What `score_suite` found.

    Attributes:
        metrics: ``NAME/accuracy``, ``NAME/accuracy_stderr`` and lm-eval's own metrics of every task and group,
            ``mean_accuracy`` and ``mean_accuracy_stderr``.
        protocol: ``score`` and ``score_source``, a text a name, and ``mean_accuracy_of``.
        members: lm-eval's own metrics of every task, those inside groups too.
        samples: name of a task -> lm-eval's records of its questions.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    members: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def score_suite(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    suite: Iterable[ScoredTask],
    settings: ScoringSettings,
    progress: Progress,
    known: Mapping[tuple[str, int], Mapping[str, Any]] | None = None,
) -> SuiteScores:
    """Scores each task or group by itself, as ``lm_eval --tasks NAME`` does.

    The mean is that of the accuracies, each name counting once; its error takes the names as independent.

    Args:
        model: in memory.
        tokenizer: its tokenizer.
        suite: what to score.
        settings: how.
        progress: told the requests done.
        known: task and examples in its prompt -> lm-eval's results, of what was scored a moment ago.

    Raises:
        NonFiniteScoresError: the model's logits, or a score, are NaN or infinite.
    """
    found = SuiteScores(protocol={"score": {}, "score_source": {}})
    chosen: dict[str, str] = {}
    for item in suite:
        results = (known or {}).get(_alone(item)) or _results(model, tokenizer, item, settings, progress)
        metrics, metric = _read(item, results, settings, found)
        found.metrics.update({f"{item.name}/{name}": value for name, value in metrics.items()})
        if metric is not None:
            chosen[item.name] = metric
    if chosen:
        means = [found.metrics[f"{name}/accuracy"] for name in chosen]
        errors = [found.metrics.get(f"{name}/accuracy_stderr", math.nan) for name in chosen]
        found.metrics["mean_accuracy"] = math.fsum(means) / len(means)
        if not any(map(math.isnan, errors)):
            found.metrics["mean_accuracy_stderr"] = math.hypot(*errors) / len(errors)
        found.protocol["mean_accuracy_of"] = ", ".join(f"{name} {metric}" for name, metric in chosen.items())
    return found


def _alone(item: ScoredTask) -> tuple[str, int] | None:
    """A single task and the examples in its prompt; None of a group."""
    return None if item.groups else (item.name, item.tasks[item.name].config.num_fewshot or 0)


def _results(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    item: ScoredTask,
    settings: ScoringSettings,
    progress: Progress,
) -> Mapping[str, Any]:
    """lm-eval's results."""
    loaded = {"tasks": dict(item.tasks), "groups": dict(item.groups)}
    with ExitStack() as ready:
        for task in item.tasks.values():
            ready.enter_context(prepared(model, task, None))
        scorer = Scorer(model, tokenizer, settings.eval_batch_size, progress, settings.share_contexts)
        scorer.stage = f"scoring {item.name}"
        with finite(item.name):
            return lm_eval.evaluator.evaluate(
                scorer,
                loaded,
                limit=settings.limit_beside,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )


def _read(
    item: ScoredTask, results: Mapping[str, Any], settings: ScoringSettings, found: SuiteScores
) -> tuple[dict[str, float], str | None]:
    """The metrics of one name, and which of them is its accuracy; the rest goes into ``found``."""
    metrics = plain_metrics(results["results"][item.name])
    metric = headline(metrics, _PAPERS)
    asked = {name: first_filter(samples) for name, samples in results["samples"].items()}
    found.protocol["score"][item.name] = _protocol(item, metric, asked, results["versions"], settings)
    sources = dict.fromkeys((task.config.metadata or {}).get("source", "") for task in item.tasks.values())
    found.protocol["score_source"][item.name] = ", ".join(sources)
    for name in item.tasks:
        found.members[name] = plain_metrics(results["results"][name])
        if settings.keep_samples:
            found.samples[name] = results["samples"][name]
    return metrics, metric


def _protocol(
    item: ScoredTask,
    metric: str | None,
    asked: Mapping[str, Sequence[dict[str, Any]]],
    versions: Mapping[str, Any],
    settings: ScoringSettings,
) -> str:
    """What a score depends on besides the model, as published tables state it: ``key=value; ...``."""
    tasks = item.tasks.values()
    count = sum(map(len, asked.values()))
    guesses = [(chance(task, asked[name]), len(asked[name])) for name, task in item.tasks.items()]
    guess = None if any(g is None for g, _ in guesses) else math.fsum(g * n for g, n in guesses) / count
    said = {
        "accuracy_metric": metric or "none",
        "task_version": versions.get(item.name),
        "num_fewshot": _each(task.config.num_fewshot or 0 for task in tasks),
        "split": _each(map(eval_split, tasks)),
        "limit": "none" if settings.limit_beside is None else settings.limit_beside,
        "samples": count,
        "questions_sha256": questions_digest(sample for samples in asked.values() for sample in samples),
        "chance": "none" if guess is None else f"{guess:.6g}",
    }
    if item.groups:
        said["tasks"] = len(item.tasks)
    return "; ".join(f"{key}={value}" for key, value in said.items())


def _each(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))
