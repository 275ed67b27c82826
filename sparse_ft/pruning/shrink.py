"""Structured masks made real: a plain, smaller checkpoint whose logits equal the masked model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder, write_json
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.structure import Family, Part, families

__all__ = ["kept_units", "shrink_checkpoint"]


def shrink_checkpoint(
    checkpoint_folder: str | Path, masks: MaskSet, target: str | Path, progress: Progress = SILENT
) -> Path:
    """Writes the checkpoint without the channels and heads that structured masks remove.

    The result is an ordinary Hugging Face folder: smaller ``intermediate_size``, ``num_attention_heads`` and
    ``num_key_value_heads``, the same ``head_dim``. Memory holds one file of the checkpoint.

    Args:
        masks: structured, with the same number of heads and channels left in every block (scope ``layer``).

    Raises:
        UserError: masks of another model, masks that are not structured, counts that differ between blocks, or
            nothing left of a block.
    """
    checkpoint = Checkpoint(checkpoint_folder)
    shapes = checkpoint.prunable_shapes()
    check_masks(masks, shapes, str(checkpoint.folder))
    members = families(checkpoint.config, shapes)
    kept = [kept_units(family, masks) for family in members]
    groups = _uniform(members, kept, "attention", "key/value heads")
    channels = _uniform(members, kept, "mlp", "MLP channels")
    selections: dict[str, list[tuple[Part, torch.Tensor]]] = {}
    for family, units in zip(members, kept, strict=True):
        for part in family.parts:
            indices = units.nonzero()[:, 0, None] * part.width + torch.arange(part.width) + part.start
            selections.setdefault(part.name, []).append((part, indices.flatten()))
        _check_masked(family, units, masks)
    progress.start("write smaller checkpoint", sum(checkpoint.nbytes(name) for name in checkpoint.names), "B")
    with atomic_folder(target) as folder:
        for other in checkpoint.folder.iterdir():
            if other.is_file() and other.suffix not in (".safetensors", ".bin", ".pt", ".gguf"):
                shutil.copy2(other, folder / other.name)
        write_json(folder / "config.json", _smaller_config(checkpoint, groups, channels))
        sizes = {}
        for file in checkpoint.files:
            tensors = {}
            for name in (name for name in checkpoint.names if checkpoint.shard(name) == file):
                tensor = _select(checkpoint.tensor(name), selections.get(name) or _bias_selection(name, selections))
                tensors[name] = tensor.contiguous()
                sizes[name] = tensor.numel() * tensor.element_size()
                progress.advance(checkpoint.nbytes(name))
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            content = json.loads(index.read_text(encoding="utf-8"))
            content.setdefault("metadata", {})["total_size"] = sum(sizes.values())
            write_json(index, content)
    progress.stop()
    return Path(target)


def kept_units(family: Family, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which units of a family a mask set keeps, bool ``[units]``: those of which any weight is kept.

    Weights of a unit that is only partly masked are not looked at here.
    """
    kept = torch.zeros(family.units, dtype=torch.bool)
    for part in family.parts:
        lines = _lines(part, masks)[part.start : part.start + family.units * part.width]
        kept |= lines.any(dim=1).view(family.units, part.width).any(dim=1)
    return kept


def _lines(part: Part, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    mask = masks[part.name]
    mask = mask if part.expert is None else mask[part.expert]
    return mask.T if part.axis == "column" else mask


def _check_masked(family: Family, units: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> None:
    for part in family.parts:
        lines = _lines(part, masks)[part.start : part.start + family.units * part.width]
        if not bool(lines[units.repeat_interleave(part.width)].all()):
            raise UserError(
                f"The masks are not structured: {part.name} has single weights masked in heads or channels that"
                " stay. Only masks of method structured can be shrunk."
            )


def _uniform(members: list[Family], kept: list[torch.Tensor], kind: str, what: str) -> int:
    counts = {int(units.sum()) for family, units in zip(members, kept, strict=True) if family.kind == kind}
    if len(counts) > 1:
        raise UserError(
            f"Blocks keep between {min(counts)} and {max(counts)} {what}; a plain checkpoint has the same number"
            " everywhere. Make the masks with method structured and scope layer."
        )
    if counts == {0}:
        raise UserError(f"The masks leave no {what}; there is no smaller model of that shape.")
    return counts.pop()


def _smaller_config(checkpoint: Checkpoint, groups: int, channels: int) -> dict[str, Any]:
    config = dict(checkpoint.config)
    heads = config["num_attention_heads"]
    old_groups = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_attention_heads"] = heads // old_groups * groups
    config["num_key_value_heads"] = groups
    config["intermediate_size"] = channels
    return config


def _bias_selection(
    name: str, selections: Mapping[str, list[tuple[Part, torch.Tensor]]]
) -> list[tuple[Part, torch.Tensor]]:
    """A bias of rows loses the rows' entries; one of columns' matrix (o, down) stays."""
    weight = name.removesuffix(".bias") + ".weight"
    found = selections.get(weight, []) if name.endswith(".bias") else []
    return [entry for entry in found if entry[0].axis == "row"]


def _select(tensor: torch.Tensor, selection: list[tuple[Part, torch.Tensor]]) -> torch.Tensor:
    if not selection:
        return tensor
    axis = 1 if selection[0][0].axis == "column" else 0
    if selection[0][0].expert is None:
        indices = torch.cat([indices for _, indices in selection])
        return tensor.index_select(axis, indices)
    experts: dict[int, list[torch.Tensor]] = {}
    for part, indices in selection:
        assert part.expert is not None
        experts.setdefault(part.expert, []).append(indices)
    return torch.stack([tensor[e].index_select(axis, torch.cat(experts[e])) for e in sorted(experts)])
