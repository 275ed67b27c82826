"""Structured masks made real: a plain, smaller checkpoint whose logits equal the masked model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder, write_json
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint, copy_other_files
from sparse_ft.models.families import architecture_of
from sparse_ft.models.folder import read_json
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
        copy_other_files(checkpoint, folder)
        write_json(folder / "config.json", _smaller_config(checkpoint, groups, channels))
        sizes = {}
        written = checkpoint.names + [name for name in checkpoint.carried if checkpoint.is_readable(name)]
        for file in checkpoint.files:
            tensors = {}
            for name in (name for name in written if checkpoint.shard(name) == file):
                tensor = checkpoint.tensor(name)
                if name not in checkpoint.carried:
                    tensor = _select(tensor, selections.get(name) or _bias_selection(name, selections))
                tensors[name] = tensor.contiguous()
                sizes[name] = tensor.numel() * tensor.element_size()
                progress.advance(checkpoint.nbytes(name))
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        if checkpoint.weights.index is not None:
            index = folder / checkpoint.weights.index.name
            content = read_json(index)
            content["metadata"]["total_size"] = sum(sizes.values())
            content["weight_map"] = {name: file for name, file in content["weight_map"].items() if name in sizes}
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
    values = checkpoint.config
    heads = values["num_attention_heads"]
    old_groups = values.get("num_key_value_heads") or heads
    sizes = {
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "num_attention_heads": heads // old_groups * groups,
        "num_key_value_heads": groups,
        architecture_of(values).width: channels,
    }
    stored = {key: value for key, value in checkpoint.stored_config.items() if key != "quantization_config"}
    return stored | sizes


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
