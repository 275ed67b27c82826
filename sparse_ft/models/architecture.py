"""What a model family is: its linear maps, its experts, its names. The families themselves are rows of `families`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "CHANNELS",
    "GROUPS",
    "HEADS",
    "Architecture",
    "Experts",
    "Projection",
    "after_the_first",
    "every_block",
    "some_steps",
]

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
        norm: a norm of its outputs that has weights for every line, and goes with them; one whose weights are those of
            a single head, for all heads, is none.
        mean_of_all: whether that norm divides by the mean over all lines, and not over those of a head.
        width: the fields of ``config.json`` whose product is the number of its channels; the first one changes when
            there are fewer.
    """

    path: str
    parts: tuple[str, ...]
    axis: str = "row"
    singles: tuple[str, ...] = ()
    norm: str = ""
    mean_of_all: bool = False
    width: tuple[str, ...] = ("intermediate_size",)

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


def every_block(config: Mapping[str, Any], block: int) -> bool:
    """Every block is a mixture."""
    return True


def some_steps(config: Mapping[str, Any], block: int) -> bool:
    """Every so many blocks one is a mixture, but those that are listed."""
    sparse = (block + 1) % (config.get("decoder_sparse_step") or 1) == 0
    return sparse and block not in (config.get("mlp_only_layers") or ())


def after_the_first(config: Mapping[str, Any], block: int) -> bool:
    """The first blocks are dense."""
    return block >= config["first_k_dense_replace"]


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block, and what stands beside them.

    Attributes:
        matrices: the 3-D parameters ``[experts, out, in]`` in which transformers holds them.
        count: the field of ``config.json`` that says how many there are, in every spelling of it.
        width: the one with their channels.
        module: the mixture in the loaded model's block; stored: in checkpoints that list its experts one by one.
        router: beside the experts, in both; never pruned.
        weighers: other maps that weigh outputs token by token, as the router does; never pruned.
        shared: the linear maps of the experts that every token takes.
        dense: those of a block that is no mixture.
        mixes: ``(config, block) -> whether it is one``.
        chosen: the field that says how many of them the router picks for a token.
        groups: the field that says into how many groups the router parts the experts; empty: it knows none.
    """

    matrices: tuple[Projection, ...]
    count: tuple[str, ...]
    width: str
    module: str = "mlp"
    stored: str = "mlp"
    router: str = "gate"
    weighers: tuple[str, ...] = ()
    shared: tuple[Projection, ...] = ()
    dense: tuple[Projection, ...] = ()
    mixes: Callable[[Mapping[str, Any], int], bool] = every_block
    chosen: str = "num_experts_per_tok"
    groups: str = ""

    def matrix_of(self, single: str) -> tuple[Projection, int]:
        """The 3-D parameter that holds a matrix listed by itself, and which of its parts that is."""
        return next((m, m.singles.index(single)) for m in self.matrices if single in m.singles)

    def count_field(self, config: Mapping[str, Any]) -> str:
        """The spelling of ``count`` that a configuration has; else transformers' own."""
        return next((name for name in self.count if name in config), self.count[0])

    def least(self, config: Mapping[str, Any]) -> int:
        """The fewest experts that a router works with."""
        # One that knows groups ranks them by their two best experts, even where there is one group.
        return max(config[self.chosen], 2 if self.groups else 1)

    def number(self, config: Mapping[str, Any]) -> int:
        """How many experts a block has."""
        return config[self.count_field(config)]


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        model_type: as ``config.json`` has it.
        projections: the linear maps of every block that are pruned and adapted, experts excepted.
        experts: of a mixture.
        title: what people call the models of the family.
        decoder: the module that holds blocks, embeddings and the last norm.
        layers, embedding: within it. norms: words of the names of norms.
        head: the output map.
        attention: the implementation that transformers has for it: ``sdpa``, or ``eager``.
        head_dim: whether ``config.json`` may give the size of heads, so that a model may have fewer of them.
        inside: types of multimodal models whose text part this is, under their ``text_config``.
        modelzoo: whether Cerebras ModelZoo's converter takes such a model.
        tiny: what the built-in tiny model has otherwise than the others (`sparse_ft.models.tiny`).
    """

    model_type: str
    projections: tuple[Projection, ...]
    experts: Experts | None = None
    title: str = ""
    decoder: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "norm")
    head: str = "lm_head"
    attention: str = "sdpa"
    head_dim: bool = True
    inside: tuple[str, ...] = ()
    modelzoo: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)

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
    def linear_maps(self) -> tuple[Projection, ...]:
        """Those of any block, routed experts excepted."""
        return self.projections + (() if self.experts is None else self.experts.shared + self.experts.dense)

    def maps(self, config: Mapping[str, Any], block: int) -> tuple[Projection, ...]:
        """The linear maps of a block, routed experts excepted."""
        if self.experts is None:
            return self.projections
        return self.projections + (self.experts.shared if self.mixes(config, block) else self.experts.dense)

    def mixes(self, config: Mapping[str, Any], block: int) -> bool:
        """Whether a block has routed experts."""
        return self.experts is not None and self.experts.mixes(config, block)
