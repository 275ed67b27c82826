"""What lm-eval's results and its records of questions say."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.task import Task

from sparse_ft.tasks.examples import gold_index

__all__ = ["answer_row", "chance", "first_filter", "headline", "majority", "plain_metrics", "questions_digest"]


_PROMPT = 500  # characters of it in a table: its end, where the question is


def plain_metrics(results: Mapping[str, Any]) -> dict[str, float]:
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


def headline(metrics: dict[str, float], names: Iterable[str]) -> str | None:
    """Adds the first of these metrics that there is, as ``accuracy`` with its error; returns its name."""
    name = next((name for name in names if name in metrics), None)
    if name is not None:
        metrics["accuracy"] = metrics[name]
        if f"{name}_stderr" in metrics:
            metrics["accuracy_stderr"] = metrics[f"{name}_stderr"]
    return name


def first_filter(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a question: lm-eval has one a filter, and each filter sees the same answers."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def answer_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A record of lm-eval as a row to read: the end of the prompt, what was right, what the model answered, and each of
    its metrics. Of choices the answer is the likeliest one, as accuracy takes it."""
    arguments, given = sample["arguments"], sample["filtered_resps"]
    prompt, right, told = str(arguments[0][0]), sample["target"], given[0] if given else None
    if isinstance(told, (list, tuple)):  # (log-likelihood, whether it is the greedy one), a choice each
        told = arguments[max(range(len(given)), key=lambda number: given[number][0])][1]
        right = arguments[right][1] if isinstance(right, int) and len(arguments) > 1 else right
    shown = prompt if len(prompt) <= _PROMPT else f"…{prompt[-_PROMPT:]}"
    row = {"question": sample["doc_id"], "prompt": shown, "right": str(right).strip(), "answer": str(told).strip()}
    return row | {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], (int, float))}


def questions_digest(samples: Iterable[Mapping[str, Any]]) -> str:
    """16 hex digits of everything that was asked and what was right, in order: the rows themselves may lie in other
    columns on the hub than in a file, and may change there."""
    identity = hashlib.sha256()
    for sample in samples:
        asked = [sample["arguments"], sample["target"]]
        identity.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return identity.hexdigest()[:16]


def chance(task: Task, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Expected accuracy of guessing: mean of 1 / choices; None where there are no choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return math.fsum(1 / len(task.doc_to_choice(sample["doc"])) for sample in samples) / len(samples)


def majority(task: Task, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Accuracy of always giving the commonest right answer; None where the questions have choices of their own."""
    if chance(task, samples) is None or len({tuple(task.doc_to_choice(s["doc"])) for s in samples}) != 1:
        return None
    answers = Counter(gold_index(task, sample["doc"]) for sample in samples)
    return answers.most_common(1)[0][1] / len(samples)
