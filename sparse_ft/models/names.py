"""Which tensors of a checkpoint are prunable, what each one is, and where it lives in the loaded model.

One mapping, made from the family's row, serves every caller. Most checkpoints name their parameters as transformers
does. Those of mixtures name every expert's matrices one by one (``block_sparse_moe.experts.3.w1.weight``), while
transformers 5 keeps all experts of a block in two 3-D parameters (``mlp.experts.gate_up_proj [E, 2I, H]``,
``mlp.experts.down_proj [E, H, I]``), and a checkpoint may also be written that way: both are understood.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_ft.errors import UserError
from sparse_ft.models.families import Architecture, Experts, Projection, architecture_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Role",
    "Slot",
    "has_fused_experts",
    "listed_shapes",
    "parameter_masks",
    "place",
    "projection_names",
    "prunable_names",
    "role",
    "router_block",
    "slots",
]

_ALL = -1  # the expert of a tensor that holds all of them


@dataclass(frozen=True)
class Role:
    """What a prunable tensor is: its block, its linear map, and its expert (None outside an MoE).

    ``expert`` is -1 for a 3-D tensor that holds all experts of a block.
    """

    block: int
    map: Projection
    expert: int | None = None

    @property
    def fused_experts(self) -> bool:
        """Whether it holds all experts of a block."""
        return self.expert == _ALL

    def is_adapted(self, targets: Collection[str] | None) -> bool:
        """Whether adapters on these projections (None: on all) change it."""
        return targets is None or any(name in targets for name in self.map.adapter_names)


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor lives in the transformers model: ``parameter[index]``."""

    parameter: str
    index: tuple[int | slice, ...] = ()

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the whole parameter (or of its gradient, mask, ...) that is this tensor: a view."""
        return tensor[self.index] if self.index else tensor


def prunable_names(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Names of the prunable tensors of a checkpoint, in name order.

    They are generated from the config and looked up in ``names``, so that a tensor the checkpoint lacks is
    noticed and one it should not have is never pruned by accident.

    Args:
        config: the model's configuration, with transformers' defaults.
        names: all tensor names of the checkpoint.

    Raises:
        UserError: a family that is not supported, or missing tensors.
    """
    row, present = architecture_of(config), set(names)
    found = []
    for block in range(config["num_hidden_layers"]):
        found += [f"{row.block(block)}{projection.path}.weight" for projection in row.maps(config, block)]
        if row.mixes(config, block):
            found += _expert_names(row.experts, row.block(block), row.experts.number(config), present)
    if missing := [name for name in found if name not in present]:
        raise UserError(
            f"The checkpoint lacks {len(missing)} tensors that a {row.model_type} model has, the first is"
            f" {missing[0]}. Is it complete, and do config.json and the weights belong together?"
        )
    return sorted(found)


def role(config: Mapping[str, Any], name: str) -> Role:
    """What the prunable tensor ``name`` is.

    Raises:
        ValueError: the name is not one that `prunable_names` gives.
    """
    found = _find(architecture_of(config), name)
    if found is None:
        raise ValueError(f"{name} is no prunable tensor")
    return found


def has_fused_experts(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the names, which may be those of another model, hold all experts of a block in one tensor."""
    row = architecture_of(config)
    return any(what is not None and what.fused_experts for what in (_find(row, name) for name in names))


def projection_names(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The projections of prunable tensors, as adapters name them."""
    return {projection for name in names for projection in role(config, name).map.adapter_names}


def listed_shapes(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a tensor in a checkpoint that lists experts one by one, in the order of its elements."""
    if ".experts." not in name:
        return {name: shape}
    row = architecture_of(config)
    if (what := _find(row, name)) is None or not what.fused_experts:
        return {name: shape}
    prefix, (experts, rows, columns) = f"{row.block(what.block)}{row.experts.stored}.experts", shape
    singles = what.map.singles
    return {
        f"{prefix}.{expert}.{single}.weight": (rows // len(singles), columns)
        for expert in range(experts)
        for single in singles
    }


def place(config: Mapping[str, Any], name: str) -> Slot:
    """Where any checkpoint tensor lives in the loaded model, prunable or not, or would if it had a place there."""
    row = architecture_of(config)
    if (what := _find(row, name)) is not None:
        return _slot(row, config, name, what)
    if row.experts is None:
        return Slot(name)
    return Slot(name.replace(f".{row.experts.stored}.", f".{row.experts.module}."))  # the router


def router_block(config: Mapping[str, Any], name: str) -> int | None:
    """The block whose router a tensor is of, which has a row for every expert; None: it is of none."""
    row = architecture_of(config)
    if row.experts is None:
        return None
    homes = "|".join(re.escape(mixture) for mixture in {row.experts.module, row.experts.stored})
    match = re.fullmatch(rf"{re.escape(row.blocks)}\.(\d+)\.({homes})\.{re.escape(row.experts.router)}\.\w+", name)
    return None if match is None else int(match[1])


def slots(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Slot]:
    """Where each prunable checkpoint tensor lives in the model that transformers builds from it."""
    row = architecture_of(config)
    return {name: _slot(row, config, name, role(config, name)) for name in names}


def parameter_masks(config: Mapping[str, Any], masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks by model parameter: those of single experts are put together into their 3-D parameter.

    Args:
        config: the content of ``config.json``.
        masks: boolean masks by checkpoint tensor name; all experts of a block or none.

    Returns:
        parameter name -> boolean mask of the parameter's shape.
    """
    import torch

    experts = architecture_of(config).experts
    whole: dict[str, torch.Tensor] = {}
    for name, slot in slots(config, masks).items():
        mask = masks[name]
        if not slot.index:
            whole[slot.parameter] = mask
            continue
        if slot.parameter not in whole:
            matrix, _ = experts.matrix_of(role(config, name).map.name)
            shape = (experts.number(config), len(matrix.parts) * mask.shape[0], mask.shape[1])
            whole[slot.parameter] = torch.ones(shape, dtype=torch.bool)
        slot.view(whole[slot.parameter]).copy_(mask)
    return whole


def _expert_names(experts: Experts, block: str, count: int, present: Collection[str]) -> list[str]:
    """The names that a block's experts have here: as one tensor a matrix, or one by one."""
    for mixture in (experts.module, experts.stored):
        fused = [f"{block}{mixture}.experts.{matrix.path}" for matrix in experts.matrices]
        if any(name in present for name in fused):
            return fused
    singles = [single for matrix in experts.matrices for single in matrix.singles]
    return [f"{block}{experts.stored}.experts.{e}.{single}.weight" for e in range(count) for single in singles]


def _find(row: Architecture, name: str) -> Role | None:
    match = re.fullmatch(rf"{re.escape(row.blocks)}\.(\d+)\.(.+)", name)
    if match is None:
        return None
    block, path = int(match[1]), match[2]
    for projection in row.linear_maps:
        if path == f"{projection.path}.weight":
            return Role(block, projection)
    if (experts := row.experts) is None:
        return None
    mixture, _, path = path.partition(".experts.")
    for matrix in experts.matrices:
        if mixture in (experts.module, experts.stored) and path == matrix.path:
            return Role(block, matrix, _ALL)
        for position, single in enumerate(matrix.singles):
            if mixture == experts.stored and (one := re.fullmatch(rf"(\d+)\.{re.escape(single)}\.weight", path)):
                return Role(block, matrix.single(position), int(one[1]))
    return None


def _slot(row: Architecture, config: Mapping[str, Any], name: str, what: Role) -> Slot:
    if what.expert is None:
        return Slot(name)
    home = f"{row.block(what.block)}{row.experts.module}.experts"
    if what.fused_experts:
        return Slot(f"{home}.{what.map.path}")
    matrix, position = row.experts.matrix_of(what.map.name)
    if len(matrix.parts) == 1:
        return Slot(f"{home}.{matrix.path}", (what.expert,))
    width = config[row.experts.width]
    return Slot(f"{home}.{matrix.path}", (what.expert, slice(position * width, (position + 1) * width)))
