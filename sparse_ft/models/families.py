"""The model families that can be pruned: one row each. Whoever needs a family's names or layout asks its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        norm: a norm of its outputs that has weights for every line, and goes with them; one whose weights are those of
            a single head, for all heads, is none.
        mean_of_all: whether that norm divides by the mean over all lines, and not over those of a head.
    """

    path: str
    parts: tuple[str, ...]
    axis: str = "row"
    singles: tuple[str, ...] = ()
    norm: str = ""
    mean_of_all: bool = False

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
_FUSED_MLP = (
    Projection("mlp.gate_up_proj", (CHANNELS, CHANNELS)),
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

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_HEAD_NORMS = ("q_norm", "k_norm")
_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", "norm")


def _with_norms(query: str, key: str, mean_of_all: bool = False) -> tuple[Projection, ...]:
    """The attention with norms over query and key heads."""
    norms = {"self_attn.q_proj": query, "self_attn.k_proj": key}
    return tuple(
        replace(map_, norm=norms[map_.path], mean_of_all=mean_of_all) if map_.path in norms else map_
        for map_ in _ATTENTION
    )


_DENSE = (
    Architecture(
        "llama",
        _ATTENTION + _MLP,
        title="Llama 1 to 3, SmolLM2, TinyLlama and others",
        modelzoo=True,
        tiny={"hidden_size": 60, "intermediate_size": 148, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    Architecture(
        "mistral",
        _ATTENTION + _MLP,
        title="Mistral",
        inside=("mistral3",),
        modelzoo=True,
        tiny={
            "hidden_size": 52,
            "intermediate_size": 132,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    Architecture(
        "ministral3",
        _ATTENTION + _MLP,
        title="Ministral 3",
        inside=("mistral3",),
        tiny={
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 128,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    Architecture(
        "qwen2",
        _ATTENTION + _MLP,
        title="Qwen2, Qwen2.5",
        # Its tokenizer always has an <|endoftext|>, whatever file it is made of.
        tiny={"tie_word_embeddings": True, "vocab_size": 520},
    ),
    Architecture("qwen3", _ATTENTION + _MLP, title="Qwen3", norms=_NORMS + _HEAD_NORMS, tiny={"head_dim": 12}),
    Architecture(
        "gemma2",
        _ATTENTION + _MLP,
        title="Gemma 2",
        norms=_GEMMA_NORMS,
        attention="eager",  # of its capped attention scores sdpa knows nothing
        tiny={"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8},
    ),
    Architecture(
        "gemma3_text",
        _ATTENTION + _MLP,
        title="Gemma 3",
        norms=_GEMMA_NORMS + _HEAD_NORMS,
        inside=("gemma3",),
        tiny={
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Architecture(
        "granite",
        _ATTENTION + _MLP,
        title="Granite 3",
        tiny={"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "mlp_bias": True},
    ),
    Architecture("smollm3", _ATTENTION + _MLP, title="SmolLM3", tiny={"no_rope_layers": [1, 0]}),
    Architecture(
        "cohere",
        _with_norms("self_attn.q_norm", "self_attn.k_norm") + _MLP,
        title="Command R",
        norms=("input_layernorm", "norm") + _HEAD_NORMS,
        tiny={"use_qk_norm": True, "logit_scale": 0.5},
    ),
    Architecture(
        "olmo2",
        _with_norms("self_attn.q_norm", "self_attn.k_norm", mean_of_all=True) + _MLP,
        title="OLMo 2",
        norms=_OUTPUT_NORMS + _HEAD_NORMS,
    ),
    Architecture(
        "stablelm",
        _with_norms("self_attn.q_layernorm", "self_attn.k_layernorm") + _MLP,
        title="StableLM 2",
        norms=(*_NORMS, "q_layernorm", "k_layernorm"),
        head_dim=False,
        tiny={"qk_layernorm": True, "use_qkv_bias": True, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    Architecture("seed_oss", _ATTENTION + _MLP, title="Seed-OSS", tiny={"head_dim": 12}),
    Architecture(
        "exaone4",
        _ATTENTION + _MLP,
        title="EXAONE 4",
        norms=_OUTPUT_NORMS + _HEAD_NORMS,
        tiny={"sliding_window": 8, "sliding_window_pattern": 2},
    ),
    Architecture("ernie4_5", _ATTENTION + _MLP, title="ERNIE 4.5", tiny={"head_dim": 12, "use_bias": True}),
    Architecture(
        "phi3",
        (
            Projection("self_attn.qkv_proj", (HEADS, GROUPS, GROUPS)),
            Projection("self_attn.o_proj", (HEADS,), "column"),
            *_FUSED_MLP,
        ),
        title="Phi-3, Phi-3.5, Phi-4",
    ),
    Architecture(
        "glm4",
        _ATTENTION + _FUSED_MLP,
        title="GLM-4",
        norms=(*_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        tiny={"head_dim": 12},
    ),
)
_MIXTURES = (
    Architecture(
        "mixtral",
        _ATTENTION,
        _MIXTRAL_EXPERTS,
        title="Mixtral",
        modelzoo=True,
        tiny={
            # Multiples of 8: torch's grouped product, which runs the experts, wants rows of 16 bytes in bfloat16.
            # Only the attention's output, with 6 x 6 columns, leaves a rest.
            "hidden_size": 40,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
)

ARCHITECTURES = {row.model_type: row for row in _DENSE + _MIXTURES}
_INSIDE = {kind: row.model_type for row in reversed(ARCHITECTURES.values()) for kind in row.inside}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a model's family.

    Args:
        config: the content of ``config.json``; of a multimodal model, its row is that of its text part.

    Raises:
        UserError: a family that the table does not have.
    """
    kind = config.get("model_type")
    if kind in _INSIDE:
        kind = (config.get("text_config") or {}).get("model_type", _INSIDE[kind])
    if kind not in ARCHITECTURES:
        raise UserError(
            f"Models of type '{kind}' are not supported; sparse_ft prunes {', '.join([*ARCHITECTURES, *_INSIDE])}"
            " models. A family is a row of a table: CONTRIBUTING.md says how to add one."
        )
    return ARCHITECTURES[kind]
