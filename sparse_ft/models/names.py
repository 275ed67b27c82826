"""Which tensors of a checkpoint are prunable, what each one is, and where it lives in the loaded model.

One mapping serves every caller. Llama and Mistral checkpoints name their parameters as transformers does.
Mixtral checkpoints name every expert's matrices one by one (``block_sparse_moe.experts.3.w1.weight``), while
transformers 5 keeps all experts of a block in two 3-D parameters (``mlp.experts.gate_up_proj [E, 2I, H]``,
``mlp.experts.down_proj [E, H, I]``), and a checkpoint may also be written that way: both are understood.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparse_ft.errors import UserError

__all__ = [
    "ARCHITECTURES",
    "Role",
    "Slot",
    "check_architecture",
    "parameter_masks",
    "place",
    "prunable_names",
    "role",
    "slots",
]

ARCHITECTURES = ("llama", "mistral", "mixtral")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_EXPERT = ("w1", "w2", "w3")  # gate, down, up
_FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Role:
    """What a prunable tensor is: its block, its projection, and its expert (None outside an MoE).

    ``expert`` is -1 for a 3-D tensor that holds all experts of a block.
    """

    block: int
    projection: str
    expert: int | None = None

    @property
    def is_attention(self) -> bool:
        return self.projection in _ATTENTION


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor lives in the transformers model: ``parameter[index]``."""

    parameter: str
    index: tuple[int | slice, ...] = ()

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the whole parameter (or of its gradient, mask, ...) that is this tensor: a view."""
        return tensor[self.index] if self.index else tensor


def check_architecture(config: Mapping[str, Any]) -> str:
    """The model's type, one of ``ARCHITECTURES``.

    Raises:
        UserError: any other.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"Models of type '{kind}' are not supported; sparse_ft prunes {', '.join(ARCHITECTURES)} models."
        )
    return kind


def prunable_names(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Names of the prunable tensors of a checkpoint, in name order.

    They are generated from the config and looked up in ``names``, so that a tensor the checkpoint lacks is
    noticed and one it should not have is never pruned by accident.

    Args:
        config: the model's configuration, with transformers' defaults.
        names: all tensor names of the checkpoint.

    Raises:
        UserError: an architecture that is not llama, mistral or mixtral, or missing tensors.
    """
    kind = check_architecture(config)
    present, found, missing = set(names), [], []
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        expected = [f"{prefix}.self_attn.{projection}.weight" for projection in _ATTENTION]
        if kind != "mixtral":
            expected += [f"{prefix}.mlp.{projection}.weight" for projection in _MLP]
        elif any(name in present for name in _fused_names(prefix)):
            expected += [name for name in _fused_names(prefix) if name in present]
            if len([name for name in expected if ".experts." in name]) != len(_FUSED):
                missing += [f"{prefix}.mlp.experts.gate_up_proj", f"{prefix}.mlp.experts.down_proj"]
        else:
            expert = f"{prefix}.block_sparse_moe.experts"
            expected += [f"{expert}.{e}.{w}.weight" for e in range(config["num_local_experts"]) for w in _EXPERT]
        found += expected
        missing += [name for name in expected if name not in present]
    if missing:
        raise UserError(
            f"The checkpoint lacks {len(missing)} tensors that a {kind} model has, the first is {missing[0]}."
            " Is it complete, and do config.json and the weights belong together?"
        )
    return sorted(found)


def role(name: str) -> Role:
    """What the prunable tensor ``name`` is.

    Raises:
        ValueError: the name is not one that `prunable_names` gives.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no prunable tensor")
    block, attention, mlp, expert, matrix, fused = match.groups()
    if attention or mlp:
        return Role(int(block), attention or mlp)
    return Role(int(block), matrix, int(expert)) if matrix else Role(int(block), fused, -1)


def place(config: Mapping[str, Any], name: str) -> Slot:
    """Where any checkpoint tensor lives in the loaded model, prunable or not, or would if it had a place there."""
    if _NAME.fullmatch(name):
        return _slot(name, role(name), config.get("intermediate_size", 0))
    return Slot(name.replace(".block_sparse_moe.", ".mlp."))  # the router of a mixture, which is not prunable


def slots(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Slot]:
    """Where each prunable checkpoint tensor lives in the model that transformers builds from it."""
    width = config.get("intermediate_size", 0)
    return {name: _slot(name, role(name), width) for name in names}


def parameter_masks(config: Mapping[str, Any], masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks by model parameter: those of single experts are put together into their 3-D parameter.

    Args:
        config: the content of ``config.json``.
        masks: boolean masks by checkpoint tensor name; all experts of a block or none.

    Returns:
        parameter name -> boolean mask of the parameter's shape.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, slot in slots(config, masks).items():
        mask = masks[name]
        if not slot.index:
            whole[slot.parameter] = mask
            continue
        if slot.parameter not in whole:
            rows = 2 * mask.shape[0] if slot.parameter.endswith("gate_up_proj") else mask.shape[0]
            shape = (config["num_local_experts"], rows, mask.shape[1])
            whole[slot.parameter] = torch.ones(shape, dtype=torch.bool)
        slot.view(whole[slot.parameter]).copy_(mask)
    return whole


_NAME = re.compile(
    r"model\.layers\.(\d+)\.(?:"
    r"self_attn\.([qkvo]_proj)\.weight"
    r"|mlp\.(gate_proj|up_proj|down_proj)\.weight"
    r"|block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight"
    r"|(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj))"
)


def _fused_names(prefix: str) -> list[str]:
    return [f"{prefix}.{moe}.experts.{matrix}" for moe in ("mlp", "block_sparse_moe") for matrix in _FUSED]


def _slot(name: str, what: Role, width: int) -> Slot:
    if what.expert is None:
        return Slot(name)
    experts = f"model.layers.{what.block}.mlp.experts"
    if what.expert < 0:
        return Slot(f"{experts}.{what.projection}")
    if what.projection == "w2":
        return Slot(f"{experts}.down_proj", (what.expert,))
    rows = slice(0, width) if what.projection == "w1" else slice(width, 2 * width)
    return Slot(f"{experts}.gate_up_proj", (what.expert, rows))
