"""lm-eval's Hugging Face model, quiet and timed, over a model that is already in memory."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from sparse_ft.errors import UserError
from sparse_ft.evaluation.batches import rows_that_fit
from sparse_ft.evaluation.finite import check_likelihoods, watched_logits
from sparse_ft.evaluation.rows import Request, Row, branched_rows, model_inputs, single_rows
from sparse_ft.models.sharding import is_sharded
from sparse_ft.progress import SILENT, Progress
from sparse_ft.tasks.examples import PairEncoder, check_ids

__all__ = ["Scorer"]

Result = TypeVar("Result")


class Scorer(HFLM):
    """HFLM for one model object: it reports to a `Progress` and chooses the batch size where asked to.

    What goes into the model and what is read from its output is as in HFLM. Its way to find a batch
    size (five passes at every size from 64 down, at the longest length) takes minutes on a CPU, so
    ``auto`` is computed instead; on a CUDA device that is short of memory it is halved and tried again.

    Attributes:
        seconds: time spent in scoring so far.
        batch_sizes_used: sizes in the order they were used.
        shares_contexts: whether answers to the same context are read in one row; only where asked for,
            because the last digits then differ from lm-eval's, and where the model's attention allows it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = "auto",
        progress: Progress = SILENT,
        share_contexts: bool = False,
    ) -> None:
        # HFLM sets a pad token and the padding side on the tokenizer it gets: not on the caller's.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.shares_contexts = share_contexts and self._keeps_logits and _takes_branches(base)
        self._embedding_rows = model.get_input_embeddings().weight.shape[0]
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
        likelihoods = self._timed(lambda: call(requests, disable_tqdm=True), requests)
        check_likelihoods(likelihoods, self.stage)
        return likelihoods

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        if self.max_length <= self.max_gen_toks:
            raise UserError(
                f"the task generates {self.max_gen_toks} tokens, but the model reads {self.max_length} in all; "
                "it needs a model of longer context"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError("the task generates text: it needs a tokenizer with an end token (eos_token)")
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        check_ids((token for context in contexts for token in context), self._embedding_rows)
        longest = max(map(len, contexts)) + self.max_gen_toks
        self.batch_size_per_gpu = self._fitting(longest, positions=1, tokens_at_once=1)
        call = super().generate_until
        with watched_logits(self.model, self.stage):
            return self._timed(lambda: self._shrinking(lambda: call(requests, disable_tqdm=True)), requests)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """HFLM's method with the vocabulary's logits computed at the answers' positions alone.

        The order, the batches, the padding and the arithmetic are HFLM's (answers that share all tokens
        but the last, such as BoolQ's two, share one row); only the logits that it throws away are not
        made. They would be most of the memory and, on a CPU, much of the time. With shared contexts the
        rows are others, and the last digits too.

        Raises:
            UserError: an answer is longer than the model's context, or a token is outside its embedding.
            NonFiniteScoresError: a log-likelihood is NaN or infinite.
        """
        tokens = (token for _, context, answer in requests for part in (context, answer) for token in part)
        check_ids(tokens, self._embedding_rows)
        results = self._likelihoods(requests, **kwargs)
        check_likelihoods((likelihood for likelihood, _ in results), self.stage)
        return results

    def _likelihoods(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        longest_answer = max(len(answer) for *_, answer in requests)
        if longest_answer > self.max_length:
            raise UserError(f"an answer has {longest_answer} tokens, but the model reads {self.max_length} at most")
        if not self._keeps_logits:
            self.batch_size_per_gpu = self._fitting(max(len(context) + len(answer) for _, context, answer in requests))
            call = super()._loglikelihood_tokens
            return self._shrinking(lambda: call(requests, disable_tqdm=True, **kwargs))
        if self.shares_contexts:
            window = getattr(self.model.config.get_text_config(), "sliding_window", None)
            rows = branched_rows(requests, self.max_length, window)
        else:
            rows = single_rows(requests, self.max_length)
        longest = max(len(row.tokens) for row in rows)
        read = max(len({position for _, positions in row.reads for position in positions}) for row in rows)
        # Rows of different lengths are read at more positions than any one of them.
        self.batch_size_per_gpu = self._fitting(longest, positions=min(longest, 4 * read))
        return self._shrinking(lambda: self._at_answers(rows, requests))

    @torch.inference_mode()
    def _at_answers(self, rows: Sequence[Row], requests: Sequence[Request]) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in _batches(rows, self.batch_size_per_gpu):
            needed = {position for row in batch for _, positions in row.reads for position in positions}
            kept = _in_whole_tiles(needed, len(batch[0].tokens))
            column = {position: place for place, position in enumerate(kept)}
            inputs = {name: value.to(self.device) for name, value in model_inputs(batch, self.model.dtype).items()}
            kept = torch.tensor(kept, device=self.device)
            logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits
            for row, row_logits in zip(batch, functional.log_softmax(logits, dim=-1), strict=True):
                for number, positions in row.reads:
                    request, _, answer = requests[number]
                    scores = row_logits[[column[position] for position in positions]]
                    tokens = torch.tensor(answer, device=self.device)
                    greedy = bool((scores.argmax(dim=-1) == tokens).all())
                    results[number] = (float(scores.gather(1, tokens[:, None]).sum()), greedy)
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, results[number])
        return results

    def tok_continuation(self, context: str, continuation: str) -> list[int]:
        """The tokens of ``continuation`` that are scored after ``context``."""
        return PairEncoder.encode(self, context, continuation)[1]

    def chat_arguments(self, chat: bool) -> dict[str, Any]:
        """What lm-eval's tasks are told where questions go into the chat template."""
        if not chat:
            return {}
        told = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": self.apply_chat_template}
        return told | {"tokenizer_name": self.tokenizer_name}

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
                if self._asked != "auto" or self.batch_size_per_gpu == 1 or is_sharded(self.model):
                    raise  # of a group the others would go on with the size as it was
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


def _takes_branches(model: torch.nn.Module) -> bool:
    """Whether the model's attention obeys a mask of our own."""
    config = model.config.get_text_config()
    chunked = getattr(config, "attention_chunk_size", None)
    return not chunked and config._attn_implementation in ("sdpa", "eager")


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """``rows`` in their order, ``size`` at once, those with branches apart from those without.

    A batch without branches needs no mask of ours, and its numbers are lm-eval's.
    """
    for _, alike in groupby(rows, key=lambda row: bool(row.branches)):
        remaining = list(alike)
        for start in range(0, len(remaining), size):
            yield remaining[start : start + size]


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
