"""Taking a model's blocks one after the other, with text that has passed through the blocks before as they are now."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sparse_ft.models.blocks import BlockModel, HiddenStates, InputWatch
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.blockerror import FirstOutputs
from sparse_ft.pruning.blockstate import UNPRUNED, BlockState

__all__ = ["ERROR", "Results", "Visit", "run_blocks"]

ERROR = "output|error"  # among the results of a block: see `sparse_ft.pruning.blockerror`
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Visit:
    """A block that `run_blocks` has come to, on one stream of text.

    Attributes:
        block, stream: their numbers.
        module: the block, with its weights of the checkpoint.
        watch: what was seen of it: an `InputWatch`, or what `run_blocks` was given.
        inputs: the hidden states that enter it.
        targets: the hidden states that leave the dense model's block; None where that does not run beside.
        before: the results of the stream before.
        advance: takes the number of samples that were worked on.
        measured: takes what was measured of the block, by the names of metrics.
    """

    block: int
    stream: int
    module: torch.nn.Module
    watch: Any
    inputs: HiddenStates
    targets: HiddenStates | None
    before: Results
    advance: Callable[[int], None]
    measured: Callable[[Mapping[str, float]], None]


def run_blocks(
    model: BlockModel,
    token_ids: torch.Tensor,
    streams: int,
    visitor: Callable[[Visit], Results],
    state: BlockState,
    hessians: bool = False,
    dense: bool = False,
    more: int = 0,
    progress: Progress = SILENT,
    stage: str = "prune blocks",
    watch: Callable[[BlockModel, int], Any] | None = None,
    errors: Sequence[str] = (),
) -> None:
    """Takes every block once: watches its inputs, lets ``visitor`` judge and change it, sends the text through.

    Args:
        token_ids: int64 ``[samples, seq_len]``.
        streams: independent copies of the text, one per level.
        visitor: may write the block's weights. Its results are kept in ``state``.
        state: where the run begins, and where it is kept after every block.
        hessians: watch x x^T too.
        dense: send the text through the dense model beside.
        more: samples that the visitor says it works on at every visit.
        watch: makes what watches a block instead of its inputs, a context.
        errors: the metrics, one a stream, of what the visitor's changes make of a block's output. Measured on the way,
            but for the last block, through which the first samples go once more.
    """
    samples = len(token_ids)
    each = streams * (2 * samples + more) + (samples if dense else 0)
    progress.start(stage, model.count * each, "samples")
    progress.advance(state.done * each)
    shape = (*token_ids.shape, model.model.config.hidden_size)

    def states(block: int, stream: int | str, first: int = samples) -> HiddenStates:
        return HiddenStates(state.hidden(block, stream), (first, *shape[1:]), model.dtype)

    if state.done == 0:
        model.embed(token_ids, state.hidden(0, 0))
        for stream in [*range(1, streams), *([UNPRUNED] if dense else [])]:
            shutil.copyfile(state.hidden(0, 0), state.hidden(0, stream))
    elif state.done < model.count:
        model.prepare(token_ids)
    for block in range(state.done, model.count):
        advance = partial(_advance, progress, f"block {block + 1} of {model.count}")
        measured, results = partial(progress.measured, block + 1), {}
        if dense:
            model.load(block)
            model.run(block, states(block, UNPRUNED), states(block + 1, UNPRUNED), advance=advance)
        for stream in range(streams):
            module = model.load(block)
            seen = watch(model, block) if watch else InputWatch(model, model.names(block), hessians)
            inputs, targets = states(block, stream), states(block + 1, UNPRUNED) if dense else None
            outputs = FirstOutputs(*shape[:2]) if errors else None
            model.run(block, inputs, outputs, seen, advance)
            results = visitor(Visit(block, stream, module, seen, inputs, targets, results, advance, measured))
            if block + 1 < model.count:
                model.run(block, inputs, states(block + 1, stream))
            elif outputs:
                some = (states(number, stream, outputs.samples) for number in (block, block + 1))
                model.run(block, *some)
            if outputs:
                error = outputs.error(inputs, states(block + 1, stream, outputs.samples))
                results[ERROR] = torch.tensor(error, dtype=torch.float64)
                measured({errors[stream]: error})
            state.save(block, stream, results)
            advance(samples)
        model.unload(block)
        state.finish(block)
    progress.stop()


def _advance(progress: Progress, note: str, samples: int) -> None:
    progress.advance(samples, note)
