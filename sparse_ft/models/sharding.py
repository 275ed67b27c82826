"""Models whose parameters are sharded over the processes of a group (FSDP 2): made, filled and written in streams.

Every process of the group calls every function, with the same arguments. A parameter is split along its first axis;
no process ever holds more of the model than its own share and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.masks.mask_set import MaskSet, unpack_bits
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.hollow import is_hollow
from sparse_ft.models.names import Slot, place, slots
from sparse_ft.models.writing import ModelWriter

__all__ = [
    "emptied",
    "fill",
    "gathered",
    "is_sharded",
    "nonzero_masked",
    "own_masks",
    "own_rows",
    "prune_sharded",
    "save_sharded",
    "shard",
]


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over processes."""
    return isinstance(next(model.parameters()), DTensor)


def shard(model: nn.Module, plain: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leaves this process its share of every parameter, on the device of the mesh; of hollow ones without values.

    Args:
        model: that is called: the plain one, or one around it.
        plain: the transformers model, whose blocks are gathered and left one after another.
        mesh: the group, one axis.
    """
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    for unit in [*plain.get_submodule(architecture_of(plain.config.to_dict()).blocks), model]:
        for parameter in unit.parameters():
            if is_hollow(parameter):
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        # The tensors that take whole parameters are made with the first; in inference mode they could not be trained.
        unit.unshard()
        unit.reshard()


def own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This process's part of a parameter, a view, and the number of its first row in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local().detach(), offset[0]


@torch.no_grad()
def fill(model: PreTrainedModel, checkpoint: Checkpoint, masks: MaskSet | None) -> None:
    """Copies a checkpoint's weights to their owners, each of which reads its own rows alone, and zeroes masked ones.

    Args:
        model: of that architecture, with adapters or without; values are rounded to its dtype.
        checkpoint: where the weights are.
        masks: None: all weights are kept.
    """
    targets = _places(model)
    for name in checkpoint.stored_names:
        slot = place(checkpoint.config, name)
        parameter = targets[slot.parameter]
        if (share := _share(slot, parameter)) is not None:
            index, rows = share
            own_rows(parameter)[0][index].copy_(checkpoint.rows(name, rows))
    if masks is not None:
        prune_sharded(model, masks)


@torch.no_grad()
def prune_sharded(model: PreTrainedModel, masks: MaskSet) -> None:
    """Sets every masked weight to zero, each in the process that owns it."""
    for parameter, index, kept in own_masks(model, masks):
        target = own_rows(parameter)[0][index]
        target.masked_fill_(~unpack_bits(kept, target.shape[-1]), 0)


def own_masks(model: PreTrainedModel, masks: MaskSet) -> Iterator[tuple[Tensor, tuple[int | slice, ...], Tensor]]:
    """This process's part of the masks: a parameter, where in its `own_rows`, and the packed bits on its device."""
    targets = _places(model)
    for name, slot in slots(model.config.to_dict(), masks.shapes).items():
        parameter = targets[slot.parameter]
        if (share := _share(slot, parameter)) is not None:
            index, rows = share
            yield parameter, index, masks.packed[name][rows].to(own_rows(parameter)[0].device)


def emptied(model: nn.Module) -> Callable[[], None]:
    """Gives the memory of a sharded model's parameters back; what is returned takes it again, without values."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    found = (parameter.to_local().untyped_storage() for parameter in model.parameters())
    storages = [storage for storage in found if storage.resizable()]  # one that numpy has seen, on a CPU, is not
    sizes = [storage.nbytes() for storage in storages]

    def take() -> None:
        for storage, size in zip(storages, sizes, strict=True):
            storage.resize_(size)

    for storage in storages:
        storage.resize_(0)
    return take


@torch.no_grad()
def nonzero_masked(model: PreTrainedModel, masks: MaskSet) -> int:
    """How many masked weights of the model are not zero, or NaN, in all processes together."""
    count = torch.zeros((), dtype=torch.int64)
    for parameter, index, kept in own_masks(model, masks):
        target = own_rows(parameter)[0][index]
        count += int((~(target == 0) & ~unpack_bits(kept, target.shape[-1])).sum())
    torch.distributed.all_reduce(count)
    return int(count)


def gathered(
    model: nn.Module, plain: PreTrainedModel, change: Callable[[list[nn.Module]], None] = lambda parts: None
) -> Iterator[dict[str, Tensor]]:
    """Whole parameters and stored buffers, those of one block at a time, by their names in the plain model.

    Args:
        model: that is sharded: the plain one, or one around it.
        plain: the transformers model.
        change: is given the modules of each block while they are whole, and may change them; that is lost afterwards.
    """
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    inside = {id(part) for unit in units[1:] for part in unit.modules()}
    paths = {id(module): path for path, module in plain.named_modules()}
    for unit in units:
        with ExitStack() as whole:
            unit.unshard()
            whole.callback(unit.reshard)
            parts = [part for part in unit.modules() if unit is not units[0] or id(part) not in inside]
            change(parts)
            found = {}
            for part in parts:
                if (path := paths.get(id(part))) is None:
                    continue
                path = f"{path.replace('.base_layer', '')}." if path else ""
                stored = {name: b for name, b in part._buffers.items() if name not in part._non_persistent_buffers_set}
                own = dict(part.named_parameters(recurse=False)) | stored
                found |= {path + name: tensor.detach() for name, tensor in own.items() if tensor is not None}
            yield found


def save_sharded(
    parts: Iterator[dict[str, Tensor]],
    plain: PreTrainedModel,
    source: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    writes: bool,
) -> None:
    """Writes a checkpoint of what `gathered` gives: as `sparse_ft.models.loading.save_model` does, block by block.

    Args:
        parts: of `gathered`.
        plain: the transformers model.
        source: the checkpoint that the model was made of, whose names are kept; tied weights are stored once.
        tokenizer: saved beside the weights.
        folder: to be written.
        writes: whether this process is the one that writes; the others only take part in the gathering.
    """
    tied = getattr(plain, "all_tied_weights_keys", None) or {}
    places: dict[str, list[tuple[str, Slot]]] = {}
    for name in source.stored_names:
        slot = place(source.config, name)
        if slot.parameter not in tied:
            places.setdefault(slot.parameter, []).append((name, slot))
    if not writes:
        for _ in parts:
            pass
        return
    whole = dict(plain.named_buffers()) | {
        name.replace(".base_layer", ""): parameter for name, parameter in plain.named_parameters(remove_duplicate=False)
    }
    units = architecture_of(source.config).blocks
    order = sorted(places, key=lambda name: name.startswith(f"{units}."))  # the root's come first
    sizes = {}
    for parameter in order:
        for name, slot in places[parameter]:
            shape = slot.view(torch.empty(whole[parameter].shape, device="meta")).shape
            sizes[name] = shape.numel() * whole[parameter].element_size()
    with ModelWriter(folder, sizes) as writer:
        for part in parts:
            for parameter, tensor in part.items():
                for name, slot in places.get(parameter, ()):
                    writer.add(name, slot.view(tensor))
        writer.finish(plain, tokenizer)


def _places(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the plain model, whatever is around a weight."""
    found = dict(model.named_buffers(remove_duplicate=False)) | dict(model.named_parameters(remove_duplicate=False))
    return {name.replace(".base_layer", ""): tensor for name, tensor in found.items()}


def _share(slot: Slot, parameter: Tensor) -> tuple[tuple[int | slice, ...], slice] | None:
    """This process's part of a checkpoint's tensor: where it lies in `own_rows`, and which of the tensor's rows."""
    own, first = own_rows(parameter)
    if not slot.index:
        return (), slice(first, first + own.shape[0]) if own.dim() else slice(None)
    expert, *rest = slot.index
    return ((expert - first, *rest), slice(None)) if first <= expert < first + own.shape[0] else None
