"""lm-eval's Hugging Face model, quiet and timed, over a model that is already in memory."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from sparse_ft.evaluation.batches import rows_that_fit
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tasks.examples import PairEncoder

__all__ = ["Scorer"]

Result = TypeVar("Result")
Request = tuple[Any, list[int], list[int]]  # what was asked, tokens of the context, tokens of the answer


class Scorer(HFLM):
    """HFLM for one model object: it reports to a `Progress` and chooses the batch size where asked to.

    What goes into the model and what is read from its output is as in HFLM. Its way to find a batch
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
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
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
        self.batch_size_per_gpu = self._fitting(longest, positions=1, tokens_at_once=1)
        call = super().generate_until
        return self._timed(lambda: self._shrinking(lambda: call(requests, disable_tqdm=True)), requests)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """HFLM's method with the vocabulary's logits computed at the answers' positions alone.

        The order, the batches, the padding and the arithmetic are HFLM's (answers that share all tokens
        but the last, such as BoolQ's two, share one pass); only the logits that it throws away are not
        made. They would be most of the memory and, on a CPU, most of the time.
        """
        longest = max(len(context) + len(answer) for _, context, answer in requests)
        # Answers of several lengths in a batch are read at more positions than the longest has.
        positions = min(longest, 4 * max(len(answer) for *_, answer in requests)) if self._keeps_logits else None
        self.batch_size_per_gpu = self._fitting(longest, positions)
        if not self._keeps_logits:
            call = super()._loglikelihood_tokens
            return self._shrinking(lambda: call(requests, disable_tqdm=True, **kwargs))
        return self._shrinking(lambda: self._at_answers(requests))

    @torch.inference_mode()
    def _at_answers(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        shared: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, answer) in enumerate(requests):
            shared.setdefault(tuple((context + answer)[-(self.max_length + 1) : -1]), []).append(index)
        order = sorted(shared, key=lambda tokens: (-len(tokens), tokens))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch_size_per_gpu):
            rows = order[start : start + self.batch_size_per_gpu]
            # Position p predicts token p + 1: an answer of n tokens is read at the last n positions.
            needed = {
                position
                for row in rows
                for index in shared[row]
                for position in range(len(row) - len(requests[index][2]), len(row))
            }
            kept = _in_whole_tiles(needed, len(rows[0]))
            column = {position: place for place, position in enumerate(kept)}
            inputs = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # on the right, by 0
            positions = torch.tensor(kept, device=self.device)
            logits = self.model(inputs.to(self.device), logits_to_keep=positions, use_cache=False).logits
            for row, row_logits in zip(rows, functional.log_softmax(logits, dim=-1), strict=True):
                for index in shared[row]:
                    request, _, answer = requests[index]
                    first = column[len(row) - len(answer)]
                    scores = row_logits[first : first + len(answer)]
                    tokens = torch.tensor(answer, device=self.device)
                    greedy = bool((scores.argmax(dim=-1) == tokens).all())
                    results[index] = (float(scores.gather(1, tokens[:, None]).sum()), greedy)
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, results[index])
        return results

    def tok_continuation(self, context: str, continuation: str) -> list[int]:
        """The tokens of ``continuation`` that are scored after ``context``."""
        return PairEncoder.encode(self, context, continuation)[1]

    def _fitting(self, longest: int, positions: int | None = None, tokens_at_once: int | None = None) -> int:
        if self._asked != "auto":
            return int(self._asked)
        return rows_that_fit(self.model, min(longest, self.max_length), positions, tokens_at_once)

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


def _in_whole_tiles(needed: set[int], length: int) -> list[int]:
    """``needed``, ascending, with positions before ``length`` added until there are a multiple of 16.

    Matrix products work on tiles of rows, and a tile that is not full is summed in another order: asked
    for one position alone, a CPU returns other last bits than it does among its neighbours. In whole tiles
    the logits are those of the full product.
    """
    others = (position for position in reversed(range(length)) if position not in needed)
    return sorted([*needed, *islice(others, -len(needed) % 16)])


class _Ticker:
    """Stands where lm-eval caches results; it is told each finished request."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, attribute: str, request: Iterable[Any], result: Any) -> None:
        self._progress.advance()
