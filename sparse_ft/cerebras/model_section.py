"""A Hugging Face configuration as ModelZoo's ``model`` section, and as its converter expects to read it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.models.cerebras.names import check_convertible, head_dim
from sparse_ft.models.families import architecture_of

__all__ = ["converter_config", "model_section"]

_ROPE_SCALINGS = ("linear", "yarn", "llama3")


def converter_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` in the words of transformers 4, which ModelZoo's converter reads.

    transformers 5 keeps everything about rotary embeddings under ``rope_parameters``; from there the converter
    would not take it, and fall back to a theta of 10,000 without a word.
    """
    old = dict(config)
    rope = dict(old.pop("rope_parameters", None) or {})
    if rope:
        old["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.get("rope_type", "default")
        old["rope_scaling"] = None if kind == "default" else rope
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return old


def model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelZoo's ``trainer.init.model`` for a model of a family that it has.

    The same as ModelZoo's converter writes, without ``norm_first`` and ``use_ff_layer1_dropout``, which its own
    schema refuses, and with the implementation of a mixture that the converter's tensors belong to.

    Args:
        config: the content of ``config.json``, of transformers 4 or 5.

    Raises:
        UserError: a model that ModelZoo cannot take (`check_convertible`), or a kind of rope scaling it lacks.
    """
    check_convertible(config)
    old = converter_config(config)
    kind, heads = old["model_type"], old["num_attention_heads"]
    groups = old.get("num_key_value_heads") or heads
    section = {
        "name": kind,
        "vocab_size": old["vocab_size"],
        "hidden_size": old["hidden_size"],
        "filter_size": old["intermediate_size"],
        "num_hidden_layers": old["num_hidden_layers"],
        "num_heads": heads,
        "max_position_embeddings": old["max_position_embeddings"],
        "share_embedding_weights": bool(old.get("tie_word_embeddings", False)),
        "layer_norm_epsilon": old["rms_norm_eps"],
        "initializer_range": old.get("initializer_range", 0.02),
        "position_embedding_type": "rotary",
        "rotary_dim": head_dim(config),
        "rope_theta": old.get("rope_theta", 10000.0),
        "nonlinearity": "swiglu",
        "norm_type": "rmsnorm",
        "attention_type": "scaled_dot_product",
        "attention_module": "aiayn_attention" if groups == heads else "multiquery_attention",
        "embedding_layer_norm": False,
        "use_projection_bias_in_attention": False,
        "use_ffn_bias_in_attention": False,
        "use_ffn_bias": False,
        "use_bias_in_output": False,
        "attention_dropout_rate": 0.0,
        "dropout_rate": 0.0,
        "embedding_dropout_rate": 0.0,
        **_rope(old.get("rope_scaling")),
    }
    if groups != heads:
        section["extra_attention_params"] = {"num_kv_groups": groups}
    if kind != "llama":
        section["attention_sliding_window_length"] = old.get("sliding_window")
    if (experts := architecture_of(config).experts) is not None:
        section["moe"] = {
            "num_experts": experts.number(old),
            "top_k": old["num_experts_per_tok"],
            "load_balancing_loss_coef": old.get("router_aux_loss_coef", 0.001),
            # The layout of the converter's output; ModelZoo's default is another, whose names it does not write.
            "moe_implementation": "optimized",
        }
    return section


def _rope(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    if not scaling:
        return {"pos_scaling_factor": 1.0}
    kind = str(scaling.get("rope_type") or scaling.get("type")).lower()
    if kind not in _ROPE_SCALINGS:
        raise UserError(f"The model's rope scaling '{kind}' is none that ModelZoo has: {', '.join(_ROPE_SCALINGS)}.")
    extra = {key: value for key, value in scaling.items() if key not in ("rope_type", "type", "factor")}
    if kind == "yarn":
        extra = {"original_max_position_embeddings": extra["original_max_position_embeddings"]}
    section = {"pos_scaling_factor": scaling["factor"], "pos_scaling_type": kind}
    return section if kind == "linear" else {**section, "pos_scaling_extra_args": extra}
