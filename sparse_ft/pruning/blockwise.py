"""Rules that look at activations (Wanda, SparseGPT, OWL, a user's own), what betters masks, and updates of what stays,
block after block.

As in the papers' code a block is scored on what the blocks pruned before it give out. Every level therefore has
hidden states of its own; a weight pruned at a level is pruned at every higher one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sparse_ft.masks.mask_set import pack_bits, unpack_bits
from sparse_ft.models.blocks import BlockModel, InputWatch
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.blockstate import BlockState
from sparse_ft.pruning.blocktuning import tune_block
from sparse_ft.pruning.importance import Importance, Statistics, score, wanda, with_floor
from sparse_ft.pruning.output import block_error, error_points
from sparse_ft.pruning.passes import ERROR, Results, Visit, run_blocks
from sparse_ft.pruning.patterns import group_mask, layer_mask, row_mask
from sparse_ft.pruning.reconstruct import samples_taken
from sparse_ft.pruning.rules import Inputs, load
from sparse_ft.pruning.sources import ScoreSource
from sparse_ft.pruning.streaming import MemorySink
from sparse_ft.pruning.structure import choose_units, families, family_scores, write_units
from sparse_ft.settings.pruning import PruningSettings
from sparse_ft.settings.rules import HESSIANS

__all__ = ["BlockPruner", "block_figures", "dense_scores"]

_RECONSTRUCTION = "reconstruction|errors"


def block_figures(
    model: BlockModel,
    token_ids: torch.Tensor,
    figure: Callable[[Sequence[torch.Tensor]], float],
    state: BlockState,
    progress: Progress = SILENT,
) -> list[float]:
    """What ``figure`` says of the scores |w| ||x|| of every block of the dense model.

    Args:
        figure: such as `allocation.outlier_share`.
    """

    def look(visit: Visit) -> Results:
        scores = []
        for name in model.names(visit.block):
            weight = model.checkpoint.tensor(name).to(model.device)
            scores.append(wanda(weight, _statistics(visit.watch, name)))
        return {"figure": torch.tensor([figure(scores)], dtype=torch.float64)}

    run_blocks(model, token_ids, 1, look, state, progress=progress, stage="look at blocks")
    return [float(state.tensor(block, 0, "figure")) for block in range(model.count)]


def dense_scores(
    model: BlockModel,
    token_ids: torch.Tensor,
    importance: Importance,
    state: BlockState,
    progress: Progress = SILENT,
) -> ScoreSource:
    """Scores of all tensors on the dense model's activations, kept on disk: for one ranking over the model."""

    def look(visit: Visit) -> Results:
        return {name: _scores(model, visit.watch, name, importance, state) for name in model.names(visit.block)}

    run_blocks(model, token_ids, 1, look, state, progress=progress, stage="score blocks")
    home = {name: block for block in range(model.count) for name in model.names(block)}
    shapes = {name: model.checkpoint.shape(name) for name in home}
    return ScoreSource(shapes, lambda name: state.tensor(home[name], 0, name).numpy())


@dataclass
class BlockPruner:
    """Prunes block after block at every level, betters masks and updates what stays; the visitor of `run_blocks`.

    Attributes:
        counts: weights to prune by tensor (of each row for scope ``row``) and level; unused for N:M and structured.
        given: ``(level, name) -> packed mask`` where the masks were made beforehand; None: chosen here.
    """

    model: BlockModel
    settings: PruningSettings
    counts: Mapping[str, Sequence[int | np.ndarray]]
    state: BlockState
    given: Callable[[int, str], np.ndarray] | None = None

    def run(self, token_ids: torch.Tensor, progress: Progress = SILENT) -> None:
        """Goes through all blocks that are not done yet."""
        settings = self.settings
        hessians = HESSIANS in (settings.rule.needs, settings.refining.needs, settings.updating.needs)
        dense = settings.reconstructs
        more = samples_taken(len(token_ids), settings.reconstruct_epochs) if dense else 0
        names = [block_error(level) for level in settings.levels]
        run_blocks(self.model, token_ids, len(names), self, self.state, hessians, dense, more, progress, errors=names)

    def __call__(self, visit: Visit) -> Results:
        names, level, settings = self.model.names(visit.block), visit.stream, self.settings
        rule, update, before = settings.rule, settings.updating, visit.before
        pruned = {name: ~unpack_bits(before[name], self._shape(name)[-1]) for name in names if name in before}
        inputs = self._inputs(names, visit.watch)
        own: Results = {}  # weights that come with the masks
        if self.given is not None:
            masks = {n: unpack_bits(torch.from_numpy(self.given(level, n)), self._shape(n)[-1]) for n in names}
        elif rule.needs == HESSIANS:
            masks, own = self._by_matrix(names, level, inputs, pruned)
        else:
            function = load(rule.function)
            scores = {name: _scores(self.model, visit.watch, name, function, self.state) for name in names}
            masks = self._choose(scores, level, pruned)
        if settings.refines:
            masks, own = self._refined(masks, inputs, pruned), {}
        results = {name: pack_bits(mask) for name, mask in masks.items()}
        if not settings.changes_weights:
            for name, mask in masks.items():
                self.model.weight(name).masked_fill_(~mask.to(self.model.device), 0)
            return results
        if not own or update.name != rule.update:
            own = {name: self._updated(name, mask, inputs) for name, mask in masks.items()}
        if settings.reconstructs:
            own, results[_RECONSTRUCTION] = self._tuned(visit, own, masks)
        for name, new in own.items():
            # Whatever made them: a rule of one's own may leave -0.0, as products with a mask do.
            new = new.masked_fill(~masks[name].to(new.device), 0)
            self.model.weight(name).copy_(new)
            results[f"{name}|weight"] = new
        return results

    def packed(self, level: int, block: int) -> dict[str, np.ndarray]:
        """The packed masks of a finished block."""
        return {name: self.state.tensor(block, level, name).numpy() for name in self.model.names(block)}

    def weight(self, level: int, block: int, name: str) -> torch.Tensor:
        """The updated weight of a finished block, in the checkpoint's dtype."""
        return self.state.tensor(block, level, f"{name}|weight")

    def measured(self, level: int) -> dict[str, Any]:
        """What was measured of every block, for the metadata: what pruning made of its output
        (`sparse_ft.pruning.blockerror`; None where that is not finite); with a reconstruction, its error ``before`` and
        ``after``, and after which ``epoch``."""
        settings, blocks = self.settings, range(self.model.count)
        errors = [float(self.state.tensor(block, level, ERROR)) for block in blocks]
        about: dict[str, Any] = {"block_errors": [error if math.isfinite(error) else None for error in errors]}
        if settings.reconstructs:
            found = [self.state.tensor(block, level, _RECONSTRUCTION).tolist() for block in blocks]
            about["reconstruction"] = {
                "epochs": settings.reconstruct_epochs,
                "batch": settings.reconstruct_batch,
                "learning_rate": settings.reconstruct_learning_rate,
                "blocks": [{"before": before, "after": after, "epoch": int(epoch)} for before, after, epoch in found],
            }
        return about

    def _choose(self, scores: Results, level: int, pruned: Results) -> Results:
        settings = self.settings
        if settings.method == "semi_structured":
            return {n: group_mask(s, settings.n, settings.m) for n, s in scores.items()}
        if settings.method == "structured":
            return self._choose_units(scores, level, pruned)
        choose = row_mask if settings.scope == "row" else layer_mask
        masks = {}
        for name, values in scores.items():
            before = pruned[name].to(values.device) if name in pruned else None
            masks[name] = choose(values, self.counts[name][level], before)
        return masks

    def _choose_units(self, scores: Results, level: int, pruned: Results) -> Results:
        shapes = {name: self._shape(name) for name in scores}
        members = families(self.model.checkpoint.config, shapes)
        source = ScoreSource(shapes, lambda name: scores[name].cpu().contiguous().numpy())
        values = family_scores(members, source)
        if pruned:
            gone = ScoreSource(shapes, lambda name: pruned[name].float().numpy())
            # Units of one block do not cross, so at the level before a unit was either wholly gone or whole.
            for kept, share in zip(values, family_scores(members, gone), strict=True):
                kept[share == 1] = -1
        sink = MemorySink(shapes, 1)
        write_units(members, choose_units(members, values, [self.settings.levels[level]], "layer"), shapes, sink)
        return {n: unpack_bits(torch.from_numpy(sink.packed(0, n)), shape[-1]) for n, shape in shapes.items()}

    def _inputs(self, names: Sequence[str], watch: InputWatch) -> dict[str, Inputs]:
        """The inputs of every matrix of the block; matrices that share them have one."""
        shared: dict[str, Inputs] = {}
        for name in names:
            owner = watch.owner(name)
            if owner not in shared:
                note, seen = partial(self._note, name), (watch.hessian(name), watch.tokens(name))
                shared[owner] = Inputs(*seen, self._shape(name)[-1], self.model.device, note)
        return {name: shared[watch.owner(name)] for name in names}

    def _note(self, where: str, text: str) -> None:
        self.state.note(f"{where}: {text}")

    def _by_matrix(
        self, names: Sequence[str], level: int, inputs: Mapping[str, Inputs], pruned: Results
    ) -> tuple[Results, Results]:
        """Masks, and weights in the checkpoint's dtype, by a rule that needs Hessians."""
        choose, masks, weights = load(self.settings.rule.function), {}, {}
        for name in names:
            k = self.counts[name][level] if self._pattern is None else 0
            how = {"k": k, "pattern": self._pattern, "pruned": self._here(pruned.get(name))}
            new, masks[name] = choose(self._weight(name), inputs[name], **how)
            weights[name] = new.to(self.model.checkpoint.dtype(name))
        return masks, weights

    def _refined(self, masks: Results, inputs: Mapping[str, Inputs], pruned: Results) -> Results:
        """Better masks of the same counts."""
        refine, better = load(self.settings.refining.function), {}
        for name, mask in masks.items():
            how = {"pattern": self._pattern, "pruned": self._here(pruned.get(name))}
            better[name] = refine(self._weight(name), self._here(mask), inputs[name], **how)
        return better

    def _updated(self, name: str, mask: torch.Tensor, inputs: Mapping[str, Inputs]) -> torch.Tensor:
        """The weights of a tensor under its mask, in the checkpoint's dtype."""
        weight, kept, updating = self._weight(name), self._here(mask), self.settings.updating
        if updating.changes_weights:
            new = load(updating.function)(weight, kept, inputs[name])
        else:
            new = weight.masked_fill(~kept, 0)
        return new.to(self.model.checkpoint.dtype(name))

    def _tuned(self, visit: Visit, weights: Results, masks: Results) -> tuple[Results, torch.Tensor]:
        """The weights of a block after its reconstruction, and its errors as they are kept."""
        settings = self.settings
        how = settings.reconstruct_epochs, settings.reconstruct_batch, settings.reconstruct_learning_rate
        tuned, done = tune_block(self.model, visit, weights, masks, *how, settings.seed)
        visit.measured(error_points(settings.levels[visit.stream], done.before, done.after))
        return tuned, torch.tensor([done.before, done.after, done.epoch], dtype=torch.float64)

    def _weight(self, name: str) -> torch.Tensor:
        """A tensor in float32 on the device."""
        return self.model.checkpoint.tensor(name).float().to(self.model.device)

    def _here(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask on the device."""
        return None if mask is None else mask.to(self.model.device)

    @property
    def _pattern(self) -> tuple[int, int] | None:
        settings = self.settings
        return (settings.n, settings.m) if settings.method == "semi_structured" else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.model.checkpoint.shape(name)


def _statistics(watch: InputWatch, name: str) -> Statistics:
    return Statistics(name, watch.input_norm(name), watch.tokens(name))


def _scores(model: BlockModel, watch: InputWatch, name: str, importance: Importance, state: BlockState) -> torch.Tensor:
    weight = model.checkpoint.tensor(name).to(model.device)
    scores, floored = with_floor(score(importance, weight, _statistics(watch, name)), weight)
    if floored:
        state.note(f"{name}: scores were all zero (no calibration token came here); ordered by magnitude")
    return scores
