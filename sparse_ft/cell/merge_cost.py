"""What training and merging did to a cell's model: weights that moved, and what the merge cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.names import role, slots

__all__ = ["MERGE_COST", "NO_WEIGHT_MOVED", "merge_warning", "weights_moved"]

MERGE_COST = "merge_cost"
NO_WEIGHT_MOVED = "no_weight_moved"


@torch.no_grad()
def weights_moved(
    merged: PreTrainedModel | Checkpoint, start: Checkpoint, masks: MaskSet | None, target_modules: Iterable[str] | None
) -> float:
    """Share of the kept weights of the trained tensors that are not what training began with.

    Holds a tensor or two beside the model.

    Args:
        merged: the model, before any re-masking, or its checkpoint.
        start: the checkpoint that training began with; its weights count as rounded to the merged ones' dtype.
        masks: what was kept; None: all of it.
        target_modules: the projections that were trained; None: all prunable ones.
    """
    trained = [name for name in start.prunable if role(start.config, name).is_adapted(target_modules)]
    moved = kept = 0
    for name, slot in slots(start.config, trained).items():
        if isinstance(merged, Checkpoint):
            weight = merged.tensor(name)
        else:
            weight = slot.view(merged.get_parameter(slot.parameter))
        changed = weight != start.tensor(name).to(weight.device, weight.dtype)
        mask = None if masks is None else masks[name].to(weight.device)
        moved += int((changed if mask is None else changed & mask).sum())
        kept += weight.numel() if mask is None else int(mask.sum())
    return moved / kept if kept else 0.0


def merge_warning(adapter: Mapping[str, float], merged: Mapping[str, float]) -> str | None:
    """One line where merging raised the loss on the answers by more than one standard error; None where it did not.

    Args:
        adapter: metrics of the model with its adapter.
        merged: of the merged one; the standard error is its loss's, over the questions.
    """
    before, after, error = adapter.get("loss"), merged.get("loss"), merged.get("loss_stderr", math.nan)
    if before is None or after is None or math.isnan(error) or not after - before > error:
        return None
    return (
        f"{MERGE_COST}: the loss is {before:.3f} with the adapter and {after:.3f} merged (standard error {error:.3f})"
    )
