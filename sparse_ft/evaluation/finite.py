"""What is not finite is a failure, not a score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["NonFiniteScoresError", "check_likelihoods", "check_metrics", "finite", "watched_logits"]


class NonFiniteScoresError(RuntimeError):
    """A model's logits, or a score made of them, are NaN or infinite."""

    failure_class = "non_finite_scores"  # see `sparse_ft.cell.failures.classify`


def check_likelihoods(likelihoods: Iterable[float], what: str) -> None:
    """Raises NonFiniteScoresError where a log-likelihood is NaN or infinite: argmax would still name a token."""
    values = list(likelihoods)
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise NonFiniteScoresError(
            f"{what}: {len(wrong)} of {len(values)} log-likelihoods are {wrong[0]}; the model's logits are NaN or"
            " infinite, so it has no score"
        )


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without standard errors that do not exist.

    Raises:
        NonFiniteScoresError: a score is NaN or infinite.
    """
    kept = {name: value for name, value in metrics.items() if math.isfinite(value) or "stderr" not in name}
    for name, value in kept.items():
        if not math.isfinite(value):
            raise NonFiniteScoresError(f"{name} is {value}; the model has no such score")
    return kept


@contextmanager
def finite(what: str) -> Iterator[None]:
    """Says of a number that Python refuses to compute (lm-eval's perplexities are ``math.exp``) that it is no score.

    Raises:
        NonFiniteScoresError: a number inside was above every float.
    """
    try:
        yield
    except OverflowError as error:
        raise NonFiniteScoresError(f"{what}: a score is above every float ({error}); it has none") from error


@contextmanager
def watched_logits(model: torch.nn.Module, what: str) -> Iterator[None]:
    """Looks at the last position's logits of every forward pass inside: greedy decoding of NaN gives token 0.

    Raises:
        NonFiniteScoresError: at the end, if any was NaN or +infinity (-infinity bars a token, and is no error).
    """
    seen: list[torch.Tensor] = []  # one flag, on the device: to read it at every token would wait for the device

    def look(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        # A row's largest is NaN where any is, +infinity where any is, and -infinity where all are.
        wrong = output.logits[:, -1].amax(dim=-1).isfinite().logical_not_().any()
        seen[:] = [wrong | seen[0]] if seen else [wrong]

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
    if seen and bool(seen[0]):
        raise NonFiniteScoresError(f"{what}: the model's logits are NaN or infinite, so it has no score")
