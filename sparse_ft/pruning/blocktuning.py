"""`sparse_ft.pruning.reconstruct` for a block of a model: its prunable weights, and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.func import functional_call

from sparse_ft.models.blocks import BlockModel
from sparse_ft.pruning.passes import Visit
from sparse_ft.pruning.reconstruct import Reconstruction, reconstruct

__all__ = ["tune_block"]


def tune_block(
    model: BlockModel,
    visit: Visit,
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> tuple[dict[str, torch.Tensor], Reconstruction]:
    """Tunes the kept weights of a block until it gives out what the dense model's block does.

    Args:
        model: with the block loaded.
        visit: the block; its inputs and its targets.
        weights: of the checkpoint's names, where tuning begins.
        masks: bool, of the same names and shapes, True = kept.
        epochs: see `reconstruct`, as for the three that follow.
        batch: samples a step.
        learning_rate: of Adam.
        seed: of the order of the samples.

    Returns:
        new weights by the checkpoint's names, of the dtypes that ``weights`` have; and how it went.
    """
    slots = {name: model.slots[name] for name in weights}
    whole: dict[str, torch.Tensor] = {}  # as the model has them: all experts of a block in one parameter
    kept: dict[str, torch.Tensor] = {}
    for name, slot in slots.items():
        if slot.parameter not in whole:
            whole[slot.parameter] = model.model.get_parameter(slot.parameter).detach().float()
            kept[slot.parameter] = torch.ones_like(whole[slot.parameter], dtype=torch.bool)
        slot.view(whole[slot.parameter]).copy_(weights[name])
        slot.view(kept[slot.parameter]).copy_(masks[name])
    prefix, length = model.family.block(visit.block), visit.inputs.shape[1]

    def forward(tuned: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        parameters = {name.removeprefix(prefix): weight.to(model.dtype) for name, weight in tuned.items()}
        arguments, keywords = model.call(visit.block, len(hidden), length)
        result = functional_call(visit.module, parameters, (hidden, *arguments), keywords)
        return result[0] if isinstance(result, tuple) else result

    how = {"epochs": epochs, "batch": batch, "learning_rate": learning_rate, "seed": seed, "advance": visit.advance}
    done = reconstruct(forward, whole, kept, visit.inputs.values, visit.targets.values, **how)
    return {name: slot.view(done.weights[slot.parameter]).to(weights[name].dtype) for name, slot in slots.items()}, done
