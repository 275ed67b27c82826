"""A model and a task made ready for scoring, and left as they came."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED

from sparse_ft.models.loading import quiet_transformers
from sparse_ft.tasks.definitions import set_fewshot
from sparse_ft.tasks.finding import quiet

__all__ = ["prepared"]


@contextmanager
def prepared(model: torch.nn.Module, task: Task, num_fewshot: int | None) -> Iterator[None]:
    """The model in eval mode, the task with its examples as lm-eval's command line draws them, and no bar on stderr.

    Args:
        model: used inside, and put back afterwards.
        task: likewise.
        num_fewshot: examples before each question; None: the task's own number.
    """
    with quiet(), quiet_transformers(), _kept_mode(model), _fewshot(task, num_fewshot), _without_bar(task):
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        yield


@contextmanager
def _kept_mode(model: torch.nn.Module) -> Iterator[None]:
    """Leaves the model in the mode (train or eval) it came in; scoring puts it into eval."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


@contextmanager
def _fewshot(task: Task, num_fewshot: int | None) -> Iterator[None]:
    """The task with so many examples before each question; None: its own number."""
    before = task.config.num_fewshot or 0
    try:
        set_fewshot(task, before if num_fewshot is None else num_fewshot)
        yield
    finally:
        task.set_config("num_fewshot", before)


@contextmanager
def _without_bar(task: Task) -> Iterator[None]:
    """Takes away the bar that lm-eval draws on stderr, unasked, while it builds the requests."""
    build = task.build_all_requests

    def silent(**kwargs: Any) -> None:
        with redirect_stderr(io.StringIO()):
            build(**kwargs)

    task.build_all_requests = silent
    try:
        yield
    finally:
        del task.build_all_requests
