"""lm-eval's Hugging Face model, quiet and timed, over a model that is already in memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from sparse_ft.evaluation.batches import rows_that_fit
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tasks.examples import PairEncoder

__all__ = ["Scorer"]

Result = TypeVar("Result")


class Scorer(HFLM):
    """HFLM for one model object: it reports to a `Progress` and chooses the batch size where asked to.

    What goes into the model and what is read from its output is HFLM's own code. Its way to find a batch
    size (five passes at every size from 64 down, at the longest length) takes minutes on a CPU, so
    ``auto`` is computed instead; on a CUDA device that is short of memory it is halved and tried again.

    Attributes:
        seconds: time spent in scoring so far.
        batch_sizes_used: sizes in the order they were used.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = "auto",
        progress: Progress = SILENT,
    ) -> None:
        # HFLM sets a pad token and the padding side on the tokenizer it gets: not on the caller's.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
        self._asked = batch_size
        self._progress = progress
        self.cache_hook = _Ticker(progress)
        self.stage = "scoring"
        self.seconds = 0.0
        self.batch_sizes_used: list[int] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._timed(lambda: super(Scorer, self).loglikelihood(requests, disable_tqdm=True), requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self.batch_size_per_gpu = self._fitting(self.max_length)
        call = super().loglikelihood_rolling
        return self._timed(lambda: call(requests, disable_tqdm=True), requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        longest = max(len(self.tok_encode(request.args[0])) for request in requests) + self.max_gen_toks
        # Generation looks at one position of each row; keys and values take the place of the logits.
        self.batch_size_per_gpu = self._fitting(longest, positions=max(1, longest // 8))
        call = super().generate_until
        return self._timed(lambda: self._shrinking(lambda: call(requests, disable_tqdm=True)), requests)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self.batch_size_per_gpu = self._fitting(max(len(context) + len(answer) for _, context, answer in requests))
        call = super()._loglikelihood_tokens
        return self._shrinking(lambda: call(requests, disable_tqdm=True, **kwargs))

    def tok_continuation(self, context: str, continuation: str) -> list[int]:
        """The tokens of ``continuation`` that are scored after ``context``."""
        return PairEncoder.encode(self, context, continuation)[1]

    def _fitting(self, longest: int, positions: int | None = None) -> int:
        if self._asked != "auto":
            return int(self._asked)
        return rows_that_fit(self.model, min(longest, self.max_length), positions)

    def _shrinking(self, call: Callable[[], Result]) -> Result:
        """``call()``, again with half the batch size as long as the device runs out of memory."""
        while True:
            self.batch_sizes_used.append(self.batch_size_per_gpu)
            try:
                return call()
            except torch.OutOfMemoryError:
                if self._asked != "auto" or self.batch_size_per_gpu == 1:
                    raise
            torch.cuda.empty_cache()
            self.batch_size_per_gpu //= 2

    def _timed(self, call: Callable[[], Result], requests: Sequence[Instance]) -> Result:
        self._progress.start(self.stage, len(requests), "requests")
        began = time.perf_counter()
        try:
            return call()
        finally:
            self.seconds += time.perf_counter() - began
            self._progress.stop()


class _Ticker:
    """Stands where lm-eval caches results; it is told each finished request."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, attribute: str, request: Iterable[Any], result: Any) -> None:
        self._progress.advance()
