"""Expert pruning: what the routed experts of a mixture contribute, and which of them go.

Lasby et al.: REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (2025), arXiv:2510.13999.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from sparse_ft.models.blocks import BlockModel
from sparse_ft.models.names import role
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.blockstate import BlockState
from sparse_ft.pruning.passes import Results, Visit, run_blocks
from sparse_ft.pruning.sources import row_parts
from sparse_ft.pruning.streaming import MaskSink

__all__ = ["ExpertWatch", "choose_experts", "expert_saliencies", "reap", "write_experts"]

# (gates [n], norms of the outputs [n]) -> what each token adds to an expert's saliency, [n]
Contribution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reap(gates: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Gate x norm of the output; an expert's saliency is the mean over the tokens routed to it.

    Args:
        gates: of the tokens that are routed to an expert, renormalised over all experts that each token takes.
        norms: L2 norms of what the expert gives out for them, before the gate.
    """
    return gates * norms


class ExpertWatch:
    """Sums up what the experts of a block contribute; a context in which the block runs.

    Args:
        model: with the block loaded.
        block: its number; one that is no mixture has no experts.
        contribution: such as `reap`.
    """

    def __init__(self, model: BlockModel, block: int, contribution: Contribution):
        config, self._contribution = model.checkpoint.config, contribution
        self._mixture = None
        if model.family.mixes(config, block):
            experts = model.family.experts
            self._mixture = model.model.get_submodule(f"{model.family.block(block)}{experts.module}.experts")
        count = experts.number(config) if self._mixture is not None else 0
        self._sums = torch.zeros(count, dtype=torch.float64)
        self.tokens = torch.zeros(count, dtype=torch.int64)

    @property
    def saliencies(self) -> torch.Tensor:
        """float64 ``[experts]``; 0 of an expert that no token reached."""
        return self._sums / self.tokens.clamp(min=1)

    def __enter__(self) -> ExpertWatch:
        if self._mixture is not None:
            self._hook = self._mixture.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._mixture is not None:
            self._hook.remove()

    def _see(self, mixture: torch.nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        hidden, chosen, weights = (*arguments, *keywords.values())
        gates = weights.double() / weights.double().sum(-1, keepdim=True)  # some routers leave that out
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            # The module itself says what one expert gives out: with a gate of 1, and no other expert.
            one, gate = chosen.new_full((len(tokens), 1), expert), weights.new_ones(len(tokens), 1)
            norms = mixture.forward(hidden[tokens], one, gate).double().norm(dim=-1)
            self._sums[expert] += self._contribution(gates[tokens, places], norms).sum().cpu()
            self.tokens[expert] += len(tokens)


def expert_saliencies(
    model: BlockModel,
    token_ids: torch.Tensor,
    contribution: Contribution,
    state: BlockState,
    progress: Progress = SILENT,
) -> dict[int, torch.Tensor]:
    """What every expert contributes in the dense model: block -> float64 ``[experts]``, of blocks that are mixtures."""

    def look(visit: Visit) -> Results:
        watch = visit.watch
        for expert in (watch.tokens == 0).nonzero()[:, 0].tolist():
            state.note(f"block {visit.block}, expert {expert}: no calibration token came here; its saliency is 0")
        return {"saliencies": watch.saliencies}

    watch = partial(ExpertWatch, contribution=contribution)
    run_blocks(model, token_ids, 1, look, state, watch=watch, progress=progress, stage="score experts")
    found = {block: state.tensor(block, 0, "saliencies") for block in range(model.count)}
    return {block: values for block, values in found.items() if len(values)}


def choose_experts(saliencies: torch.Tensor, count: int) -> torch.Tensor:
    """Which experts stay, bool ``[experts]``: all but the ``count`` lowest, ties by position."""
    kept = torch.ones(len(saliencies), dtype=torch.bool)
    kept[torch.argsort(saliencies, stable=True)[:count]] = False
    return kept


def write_experts(
    config: Mapping[str, Any],
    kept: Sequence[Mapping[int, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    sink: MaskSink,
) -> None:
    """Writes the masks of every level: of an expert that goes no weight stays, of everything else all.

    Args:
        kept: of each level, block -> bool ``[experts]``.
        shapes: of the prunable tensors, experts one by one.
    """
    for level, blocks in enumerate(kept):
        for name in sorted(shapes):
            what = role(config, name)
            stays = what.expert is None or bool(blocks[what.block][what.expert])
            for first, last, columns in row_parts(shapes[name]):
                row = np.packbits(np.full(columns, stays), bitorder="little")
                sink.append(level, name, np.tile(row, (last - first, 1)))
