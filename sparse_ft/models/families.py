"""The model families that can be pruned: one row each. Whoever needs a family's names or layout asks its row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.models.architecture import (
    CHANNELS,
    GROUPS,
    HEADS,
    Architecture,
    Experts,
    Projection,
    after_the_first,
    some_steps,
)

__all__ = [
    "ARCHITECTURES",
    "TEXT_NAMES",
    "Architecture",
    "Experts",
    "Projection",
    "architecture_of",
    "is_multimodal",
    "text_name",
]

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
    count=("num_local_experts",),
    width="intermediate_size",
    stored="block_sparse_moe",
)


def _listed(width: str, **more: Any) -> Experts:
    """Experts by the names that most families' hub checkpoints have: ``mlp.experts.3.gate_proj.weight``."""
    matrices = (
        Projection("gate_up_proj", (CHANNELS, CHANNELS), singles=("gate_proj", "up_proj")),
        Projection("down_proj", (CHANNELS,), "column", singles=("down_proj",)),
    )
    return Experts(**{"matrices": matrices, "count": ("num_experts", "num_local_experts"), "width": width} | more)


def _mlp(module: str, *width: str) -> tuple[Projection, ...]:
    """The maps of an MLP in another place than a dense block's."""
    return tuple(replace(map_, path=f"{module}.{map_.name}", width=width) for map_ in _MLP)


_MOE_WIDTH = "moe_intermediate_size"
_DEEPSEEK_EXPERTS = _listed(
    _MOE_WIDTH,
    count=("n_routed_experts", "num_local_experts"),
    shared=_mlp("mlp.shared_experts", _MOE_WIDTH, "n_shared_experts"),
    dense=_MLP,
    mixes=after_the_first,
    groups="n_group",
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_HEAD_NORMS = ("q_norm", "k_norm")
_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", "norm")


def _with_norms(mean_of_all: bool) -> tuple[Projection, ...]:
    """The attention with norms that have weights of their own for every query and key head."""
    query, key, *others = _ATTENTION
    return (
        replace(query, norm="self_attn.q_norm", mean_of_all=mean_of_all),
        replace(key, norm="self_attn.k_norm", mean_of_all=mean_of_all),
        *others,
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
        _with_norms(mean_of_all=False) + _MLP,
        title="Command R",
        norms=("input_layernorm", "norm") + _HEAD_NORMS,
        tiny={"use_qk_norm": True, "logit_scale": 0.5},
    ),
    Architecture(
        "olmo2",
        _with_norms(mean_of_all=True) + _MLP,
        title="OLMo 2",
        norms=_OUTPUT_NORMS + _HEAD_NORMS,
        tiny={"rms_norm_eps": 1e-6},
    ),
    Architecture(
        "stablelm",
        _ATTENTION + _MLP,
        title="StableLM 2",
        norms=(*_NORMS, "q_layernorm", "k_layernorm"),
        head_dim=False,  # heads are as many as fill the hidden size
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
    Architecture(
        "qwen2_moe",
        _ATTENTION,
        _listed(
            _MOE_WIDTH,
            weighers=("shared_expert_gate",),
            shared=_mlp("mlp.shared_expert", "shared_expert_intermediate_size"),
            dense=_MLP,
            mixes=some_steps,
        ),
        title="Qwen1.5-MoE, Qwen2-MoE",
        tiny={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            _MOE_WIDTH: 32,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "vocab_size": 520,
        },
    ),
    Architecture(
        "qwen3_moe",
        _ATTENTION,
        _listed(_MOE_WIDTH, dense=_MLP, mixes=some_steps),
        title="Qwen3-MoE",
        norms=_NORMS + _HEAD_NORMS,
        tiny={
            "num_experts": 6,
            "num_experts_per_tok": 2,
            _MOE_WIDTH: 32,
            "head_dim": 12,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
    ),
    Architecture(
        "olmoe",
        _with_norms(mean_of_all=True),
        _listed("intermediate_size"),
        title="OLMoE",
        norms=_NORMS + _HEAD_NORMS,
        head_dim=False,
        tiny={"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    Architecture(
        "glm4_moe",
        _ATTENTION,
        _DEEPSEEK_EXPERTS,
        title="GLM-4.5, GLM-4.6",
        norms=_NORMS + _HEAD_NORMS,
        tiny={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            _MOE_WIDTH: 32,
            "head_dim": 12,
            "use_qk_norm": True,
        },
    ),
    Architecture(
        "dots1",
        _ATTENTION,
        _DEEPSEEK_EXPERTS,
        title="dots.llm1",
        norms=_NORMS + _HEAD_NORMS,
        tiny={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            _MOE_WIDTH: 32,
            "head_dim": 12,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
)

ARCHITECTURES = {row.model_type: row for row in _DENSE + _MIXTURES}
_INSIDE = {kind: row.model_type for row in reversed(ARCHITECTURES.values()) for kind in row.inside}

# How names of the text part begin in multimodal checkpoints (two of the hub, one of transformers 5's own model), and in
# checkpoints of the text part alone.
TEXT_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


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


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is that of a multimodal model, whose text part is pruned."""
    return config.get("model_type") in _INSIDE


def text_name(name: str) -> str:
    """What a tensor of a multimodal checkpoint is called in a checkpoint of its text part alone.

    Tensors of other parts keep their names, which no text model has.
    """
    for theirs, ours in TEXT_NAMES.items():
        if re.match(theirs, name):
            return re.sub(theirs, ours, name)
    return name
