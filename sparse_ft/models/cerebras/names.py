"""What ModelZoo's names and layouts are in Hugging Face's: the map behind Cerebras checkpoints. Pure.

ModelZoo builds the families whose rows say so on its GPT-2 backbone, with other names, with the rows of the query and
key projections interleaved (its rotary embedding turns neighbouring rows, Hugging Face's turns halves of a head),
and with the experts of a mixture in one tensor ``[out, experts, in]``. Below, ``transformer_decoder...`` are the
names in its converter's output; a module's own state dict has ``model.`` before them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparse_ft.errors import UserError
from sparse_ft.models.families import ARCHITECTURES, architecture_of

__all__ = ["Place", "check_convertible", "head_dim", "places"]

_LAYER = {
    "input_layernorm.weight": "norm1.weight",
    "post_attention_layernorm.weight": "norm3.weight",
    "self_attn.q_proj.weight": "self_attn.proj_q_dense_layer.weight",
    "self_attn.k_proj.weight": "self_attn.proj_k_dense_layer.weight",
    "self_attn.v_proj.weight": "self_attn.proj_v_dense_layer.weight",
    "self_attn.o_proj.weight": "self_attn.proj_output_dense_layer.weight",
    "mlp.up_proj.weight": "ffn.ffn.0.linear_layer.weight",
    "mlp.gate_proj.weight": "ffn.ffn.0.linear_layer_for_glu.weight",
    "mlp.down_proj.weight": "ffn.ffn.1.linear_layer.weight",
}
_ROUTER = "ffn.gate.weight"
_EXPERT = {
    "w1": "ffn.experts.fused_ffns.0.linear_layer_for_glu.expert_weights",
    "w2": "ffn.experts.fused_ffns.1.linear_layer.expert_weights",
    "w3": "ffn.experts.fused_ffns.0.linear_layer.expert_weights",
}


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lives in ModelZoo's model.

    Attributes:
        name: the tensor's name there, without any ``model.`` before it.
        heads: query or key heads whose rows are interleaved; None where rows keep their order.
        expert: position in a tensor ``[out, experts, in]`` of all experts; None for a tensor of its own.
    """

    name: str
    heads: int | None = None
    expert: int | None = None

    @property
    def index(self) -> tuple[Any, ...]:
        """What to read of the whole tensor."""
        return () if self.expert is None else (slice(None), self.expert, slice(None))

    def from_modelzoo(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part ``tensor = whole[index]`` with its rows in Hugging Face's order."""
        if self.heads is None:
            return tensor
        rows = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape)

    def to_modelzoo(self, tensor: torch.Tensor) -> torch.Tensor:
        """A Hugging Face tensor (or its mask) with its rows in ModelZoo's order."""
        if self.heads is None:
            return tensor
        rows = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape)


def places(config: Mapping[str, Any]) -> dict[str, Place]:
    """Where every tensor of a Hugging Face checkpoint (experts named one by one) lives in ModelZoo's model.

    Args:
        config: the content of ``config.json``.

    Raises:
        UserError: a model that ModelZoo's converter cannot take (see `check_convertible`).
    """
    check_convertible(config)
    row = architecture_of(config)
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    found = {
        row.embedding_weight: Place("embedding_layer.word_embeddings.weight"),
        f"{row.decoder}.norm.weight": Place("transformer_decoder.norm.weight"),
        row.head_weight: Place("lm_head.weight"),
    }
    for block in range(config["num_hidden_layers"]):
        here, there = row.block(block), f"transformer_decoder.layers.{block}."
        for name, theirs in _LAYER.items():
            if row.experts is None or not name.startswith("mlp."):
                interleaved = {"self_attn.q_proj.weight": heads, "self_attn.k_proj.weight": groups}.get(name)
                found[here + name] = Place(there + theirs, interleaved)
        if row.experts is not None:
            mixture = here + row.experts.stored
            found[f"{mixture}.{row.experts.router}.weight"] = Place(there + _ROUTER)
            for expert in range(row.experts.number(config)):
                for matrix, theirs in _EXPERT.items():
                    found[f"{mixture}.experts.{expert}.{matrix}.weight"] = Place(there + theirs, expert=expert)
    return found


def head_dim(config: Mapping[str, Any]) -> int:
    """Rows of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def check_convertible(config: Mapping[str, Any]) -> None:
    """Checks what ModelZoo's converter takes silently and gets wrong, or ends in a traceback.

    Raises:
        UserError: another architecture, a head size that is not hidden_size / heads or is odd, biases, or an
            activation other than SiLU.
    """
    known = [name for name, row in ARCHITECTURES.items() if row.modelzoo]
    if (kind := config.get("model_type")) not in known:
        raise UserError(f"ModelZoo has no converter for '{kind}' here; {', '.join(known)} are supported.")
    size = head_dim(config)
    if size * config["num_attention_heads"] != config["hidden_size"]:
        raise UserError(
            f"The model's head_dim {size} times {config['num_attention_heads']} heads is not its hidden_size"
            f" {config['hidden_size']}: ModelZoo's converter interleaves the rows of such a model wrongly."
        )
    if size % 2:
        raise UserError(f"The model's head_dim {size} is odd; rotary embeddings on ModelZoo need an even one.")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError("The model has biases in its linear maps; ModelZoo's llama has none.")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"The model's activation is {config['hidden_act']}; only silu (swiglu) is supported.")


_OWN_PREFIX = re.compile(r"(?:model\.)?(.*)")


def strip_prefix(names: Collection[str]) -> dict[str, str]:
    """ModelZoo names without the module's ``model.`` -> the names as they are in the file.

    The trainer saves ``model.transformer_decoder...``, the converter ``transformer_decoder...``.
    """
    return {_OWN_PREFIX.fullmatch(name).group(1): name for name in names}
