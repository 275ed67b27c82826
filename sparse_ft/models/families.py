"""The model families that can be pruned: one row each. Whoever needs a family's names or layout asks its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparse_ft.errors import UserError

__all__ = ["ARCHITECTURES", "Architecture", "Experts", "Projection", "architecture_of"]

# What the lines of a projection belong to: query heads, key/value heads, channels of an MLP.
HEADS, GROUPS, CHANNELS = "heads", "groups", "channels"


@dataclass(frozen=True)
class Projection:
    """A linear map of a decoder block, or of the experts of one.

    Attributes:
        path: its module in the block (``self_attn.q_proj``); of experts, the 3-D parameter among them.
        parts: what its lines belong to, part after part: a fused ``qkv_proj`` has HEADS, GROUPS and GROUPS.
        axis: which lines those are, ``row`` (outputs) or ``column`` (inputs).
        singles: of experts, the names of the parts in checkpoints that list experts one by one.
    """

    path: str
    parts: tuple[str, ...]
    axis: str = "row"
    singles: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As people call it."""
        return self.path.rpartition(".")[2]

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """As adapters name it: experts by the names that they have one by one, however they are stored."""
        return self.singles or (self.name,)

    @property
    def is_attention(self) -> bool:
        return CHANNELS not in self.parts

    def single(self, position: int) -> Projection:
        """One part of experts' matrices, as a map of its own."""
        return replace(self, path=self.singles[position], parts=(self.parts[position],), singles=())


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block.

    Attributes:
        matrices: the 3-D parameters ``[experts, out, in]`` in which transformers holds them.
        count, width: the fields of ``config.json`` that say how many there are, and their channels.
        module: the mixture in the loaded model's block; stored: in checkpoints that list its experts one by one.
        router: beside the experts, in both; never pruned.
    """

    matrices: tuple[Projection, ...]
    count: str
    width: str
    module: str
    stored: str
    router: str = "gate"

    def matrix_of(self, single: str) -> tuple[Projection, int]:
        """The 3-D parameter that holds a matrix listed by itself, and which of its parts that is."""
        return next((m, m.singles.index(single)) for m in self.matrices if single in m.singles)


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        model_type: as ``config.json`` has it.
        projections: the linear maps of every block that are pruned and adapted, experts excepted.
        experts: of a mixture.
        decoder: the module that holds blocks, embeddings and the last norm.
        layers, embedding: within it. norms: the last words of the names of norms.
        head: the output map.
        modelzoo: whether Cerebras ModelZoo's converter takes such a model.
    """

    model_type: str
    projections: tuple[Projection, ...]
    experts: Experts | None = None
    decoder: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "norm")
    head: str = "lm_head"
    modelzoo: bool = False

    @property
    def blocks(self) -> str:
        """The module that holds the blocks."""
        return f"{self.decoder}.{self.layers}"

    def block(self, number: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.blocks}.{number}."

    @property
    def embedding_weight(self) -> str:
        return f"{self.decoder}.{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"

    @property
    def width(self) -> str:
        """The field of ``config.json`` with the channels of an MLP, or of an expert."""
        return "intermediate_size" if self.experts is None else self.experts.width


_ATTENTION = (
    Projection("self_attn.q_proj", (HEADS,)),
    Projection("self_attn.k_proj", (GROUPS,)),
    Projection("self_attn.v_proj", (GROUPS,)),
    Projection("self_attn.o_proj", (HEADS,), "column"),
)
_MLP = (
    Projection("mlp.gate_proj", (CHANNELS,)),
    Projection("mlp.up_proj", (CHANNELS,)),
    Projection("mlp.down_proj", (CHANNELS,), "column"),
)
_MIXTRAL_EXPERTS = Experts(
    matrices=(
        Projection("gate_up_proj", (CHANNELS, CHANNELS), singles=("w1", "w3")),
        Projection("down_proj", (CHANNELS,), "column", singles=("w2",)),
    ),
    count="num_local_experts",
    width="intermediate_size",
    module="mlp",
    stored="block_sparse_moe",
)

ARCHITECTURES = {
    row.model_type: row
    for row in (
        Architecture("llama", _ATTENTION + _MLP, modelzoo=True),
        Architecture("mistral", _ATTENTION + _MLP, modelzoo=True),
        Architecture("mixtral", _ATTENTION, _MIXTRAL_EXPERTS, modelzoo=True),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a model's family.

    Args:
        config: the content of ``config.json``.

    Raises:
        UserError: a family that the table does not have.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"Models of type '{kind}' are not supported; sparse_ft prunes {', '.join(ARCHITECTURES)} models."
        )
    return ARCHITECTURES[kind]
