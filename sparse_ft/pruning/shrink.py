"""Masks of whole channels, heads and experts made real: a plain, smaller checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder, write_json
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_other_files
from sparse_ft.models.families import architecture_of
from sparse_ft.models.folder import read_json
from sparse_ft.models.mixtures import kept_experts, name_without, refitted
from sparse_ft.models.names import place, role, router_block
from sparse_ft.models.skeleton import build_skeleton, config_values
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.structure import Family, Part, families
from sparse_ft.settings.rules import EXPERTS

__all__ = ["kept_units", "shrink_checkpoint"]


def shrink_checkpoint(
    checkpoint_folder: str | Path, masks: MaskSet, target: str | Path, progress: Progress = SILENT
) -> Path:
    """Writes the checkpoint without the channels, heads and experts that masks remove.

    The result is an ordinary Hugging Face folder: smaller ``intermediate_size``, ``num_attention_heads`` and
    ``num_key_value_heads``, the same ``head_dim``; and fewer experts, which the router does not know any more either.
    Its logits are those of the masked model, where the experts that are gone have router logits of -inf. Biases and
    norms with weights for every head lose those that go; a norm over all heads has its weights divided by the root of
    the share that stays, since its mean is over fewer. Where transformers has no model of that few heads, the next
    larger number that it has is written, and those beyond what the masks keep are zeros. Memory holds one file of the
    checkpoint.

    Args:
        masks: structured, with the same number of heads and channels left in every block (scope ``layer``), or of
            method ``experts``.

    Raises:
        UserError: masks of another model, masks that are not structured, counts that differ between blocks,
            nothing left of a block, or a model that transformers cannot build that small.
    """
    checkpoint = Checkpoint(checkpoint_folder)
    shapes = checkpoint.prunable_shapes()
    masks = refitted(checkpoint.config, masks, shapes)
    check_masks(masks, shapes, str(checkpoint.folder))
    # A structured expert without channels gives out nothing, and tokens still go there: it is not gone.
    left = kept_experts(checkpoint.config, masks) if masks.metadata.get("method") == EXPERTS else {}
    new_name = partial(name_without, checkpoint.config, kept=left)
    members = [family for family in families(checkpoint.config, shapes) if new_name(family.parts[0].name) is not None]
    kept = [kept_units(family, masks) for family in members]
    sizes = _sizes(members, kept)
    for family, units in zip(members, kept, strict=True):
        _check_masked(family, units, masks)
    groups, zeroed = _groups_taken(checkpoint, sizes["num_key_value_heads"]), set()
    if groups > sizes["num_key_value_heads"]:
        zeroed = {part.name for family in members for part in family.parts if family.kind == "attention"}
        progress.say(_of_zeros(checkpoint.config, sizes["num_key_value_heads"], groups))
    sizes |= _head_sizes(checkpoint.config, groups) | _expert_sizes(checkpoint, left)
    selections: dict[str, list[tuple[Part, torch.Tensor]]] = {}
    for family, units in zip(members, kept, strict=True):
        units = _filled_up(units, groups) if family.kind == "attention" else units
        for part in family.parts:
            indices = units.nonzero()[:, 0, None] * part.width + torch.arange(part.width) + part.start
            selections.setdefault(part.name, []).append((part, indices.flatten()))
    norms = _norms(checkpoint, selections)
    progress.start("write smaller checkpoint", sum(checkpoint.nbytes(name) for name in checkpoint.names), "B")
    with atomic_folder(target) as folder:
        copy_other_files(checkpoint, folder)
        write_json(folder / "config.json", _smaller_config(checkpoint, sizes))
        _check_buildable(checkpoint, folder, selections, new_name)
        homes, total = {}, 0
        carried = {name for name in checkpoint.carried if checkpoint.is_readable(name)}
        written = checkpoint.names + sorted(carried)
        for file in checkpoint.files:
            tensors = {}
            for name in (name for name in written if checkpoint.shard(name) == file):
                tensor = checkpoint.tensor(name)
                progress.advance(checkpoint.nbytes(name))
                if name not in carried:
                    if name in zeroed:
                        tensor = tensor.masked_fill(~masks[name], 0)
                    tensor = _select(tensor, selections.get(name) or _bias_selection(name, selections))
                    tensor = _routed(checkpoint.config, name, tensor, left)
                if name in norms:
                    lines, factor = norms[name]
                    kept_lines = (tensor.flatten()[lines].double() * factor).to(tensor.dtype)
                    tensor = kept_lines.reshape(-1, *tensor.shape[1:])
                if (new := new_name(name) if name in shapes else name) is None:
                    continue
                new = checkpoint.stored_name(name) if new == name else new
                tensors[new] = tensor.contiguous()
                homes[new], total = file.name, total + tensor.numel() * tensor.element_size()
            if tensors:
                save_file(tensors, folder / file.name, metadata={"format": "pt"})
        if checkpoint.weights.index is not None:
            index = folder / checkpoint.weights.index.name
            content = read_json(index)
            content["metadata"]["total_size"] = total
            content["weight_map"] = homes
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
    return masks[part.name].T if part.axis == "column" else masks[part.name]


def _check_masked(family: Family, units: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> None:
    for part in family.parts:
        lines = _lines(part, masks)[part.start : part.start + family.units * part.width]
        if not bool(lines[units.repeat_interleave(part.width)].all()):
            raise UserError(
                f"The masks are not structured: {part.name} has single weights masked in heads or channels that"
                " stay. Only masks of method structured can be shrunk."
            )


def _sizes(members: list[Family], kept: list[torch.Tensor]) -> dict[str, int]:
    """The fields of ``config.json`` that say how many units masks keep."""
    left: dict[str, set[int]] = {}
    kinds = {family.field: "key/value heads" if family.kind == "attention" else "MLP channels" for family in members}
    for family, units in zip(members, kept, strict=True):
        count, rest = divmod(int(units.sum()), family.times)
        if rest:
            raise UserError(
                f"Block {family.block} keeps {int(units.sum())} channels; {family.field} counts {family.times} as one."
                " Make the masks with method structured and scope layer."
            )
        left.setdefault(family.field, set()).add(count)
    for field, counts in left.items():
        what = kinds[field]
        if len(counts) > 1:
            raise UserError(
                f"Blocks keep between {min(counts)} and {max(counts)} {what} ({field}); a plain checkpoint has the same"
                " number everywhere. Make the masks with method structured and scope layer."
            )
        if counts == {0}:
            raise UserError(f"The masks leave no {what} ({field}); there is no smaller model of that shape.")
    return {field: counts.pop() for field, counts in left.items()}


def _head_sizes(config: Mapping[str, Any], groups: int) -> dict[str, int]:
    """The fields of ``config.json`` of a model with so many key/value heads, each of as many query heads and as large
    as before."""
    heads, row = config["num_attention_heads"], architecture_of(config)
    sizes = {"num_attention_heads": heads // _groups(config) * groups, "num_key_value_heads": groups}
    return sizes | ({"head_dim": config.get("head_dim") or config["hidden_size"] // heads} if row.head_dim else {})


def _groups(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _groups_taken(checkpoint: Checkpoint, least: int) -> int:
    """The smallest number of key/value heads, ``least`` or more, with which transformers has the model."""
    config, row = checkpoint.config, architecture_of(checkpoint.config)
    # Biases are not masked: in a norm over all heads those of heads that go count still.
    counted = [f"{map_.path}.bias" for map_ in row.projections if map_.mean_of_all]
    if not row.head_dim or any(name.endswith(tuple(counted)) for name in checkpoint.names if counted):
        return _groups(config)
    for groups in range(least, _groups(config)):
        with suppress(UserError):
            build_skeleton(config | _head_sizes(config, groups))
            return groups
    return _groups(config)


def _of_zeros(config: Mapping[str, Any], left: int, groups: int) -> str:
    """What a run says of heads that are written and not kept."""
    all_, kept, written = (_head_sizes(config, n)["num_attention_heads"] for n in (_groups(config), left, groups))
    return (
        f"shrink: {kept} of {all_} heads are kept, and transformers has no {config['model_type']} model of that many;"
        f" {written} are written, of which {written - kept} are zeros"
    )


def _filled_up(units: torch.Tensor, count: int) -> torch.Tensor:
    """The units, and of the others the first ones, so that there are ``count``."""
    filled = units.clone()
    filled[(~units).nonzero()[: count - int(units.sum()), 0]] = True
    return filled


def _expert_sizes(checkpoint: Checkpoint, left: Mapping[int, list[int]]) -> dict[str, int]:
    """The field of ``config.json`` that says how many experts are left."""
    counts = {len(experts) for experts in left.values()}
    if not counts:
        return {}
    if len(counts) > 1:
        raise UserError(
            f"Blocks keep between {min(counts)} and {max(counts)} experts; a plain checkpoint has the same number"
            " everywhere. Make the masks with method experts."
        )
    experts, (count,) = architecture_of(checkpoint.config).experts, counts
    if count < (least := experts.least(checkpoint.config)):
        raise UserError(f"The masks leave {count} experts in a block, and its router needs at least {least}.")
    return {experts.count_field(checkpoint.stored_config): count}


def _routed(config: Mapping[str, Any], name: str, tensor: torch.Tensor, left: Mapping[int, list[int]]) -> torch.Tensor:
    """A router's tensor with the rows of the experts that are left; any other tensor as it is."""
    block = router_block(config, name) if left else None
    return tensor if block is None else tensor[left[block]]


def _smaller_config(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> dict[str, Any]:
    stored = {key: value for key, value in checkpoint.stored_config.items() if key != "quantization_config"}
    if checkpoint.is_multimodal:
        return stored | {"text_config": stored.get("text_config", {}) | sizes}
    return stored | sizes


def _norms(
    checkpoint: Checkpoint, selections: Mapping[str, list[tuple[Part, torch.Tensor]]]
) -> dict[str, tuple[torch.Tensor, float]]:
    """Of every norm with weights for all heads: which of them stay, and what they are multiplied with.

    Where the norm's mean is over all heads, it is larger by (all / kept) over those that stay: the others were zeros.
    What is added to the mean (``rms_norm_eps``) stays, and changes the output by less than its share in the mean.
    """
    found, own = {}, set(checkpoint.names)
    for name, selection in selections.items():
        projection = role(checkpoint.config, name).map
        module = name.removesuffix(f"{projection.path}.weight") + projection.norm
        for norm in own & {f"{module}.weight", f"{module}.bias"} if projection.norm else ():
            lines, (_, kept) = checkpoint.shape(name)[0], selection[0]
            found[norm] = kept, math.sqrt(lines / len(kept)) if projection.mean_of_all else 1.0
    return found


def _check_buildable(
    checkpoint: Checkpoint,
    folder: Path,
    selections: Mapping[str, list[tuple[Part, torch.Tensor]]],
    new_name: Callable[[str], str | None],
) -> None:
    """Asks transformers, before anything is written, whether its model of the new config.json has the new shapes."""
    try:
        values = config_values(folder)
        found = build_skeleton(values).tensors
    except UserError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"There is no smaller checkpoint for these masks: transformers refuses it: {reason}") from None
    for name, selection in selections.items():
        shape = list(checkpoint.shape(name))
        shape[selection[0][0].axis == "column"] = sum(len(indices) for _, indices in selection)
        slot = place(values, new_name(name) or name)
        wanted = slot.view(torch.empty(found[slot.parameter], device="meta")).shape
        if tuple(shape) != tuple(wanted):
            raise UserError(
                f"There is no smaller checkpoint for these masks: {name} would be {shape}, and transformers' model has"
                f" {list(wanted)} there."
            )


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
    return tensor.index_select(axis, torch.cat([indices for _, indices in selection]))
