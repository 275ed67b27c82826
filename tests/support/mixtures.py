"""Mixtures for tests: what a router without some experts gives out, and text."""

from contextlib import contextmanager

import torch

from sparse_ft.models.families import architecture_of

MIXTURES = ("tiny-mixtral", "tiny-qwen2_moe", "tiny-qwen3_moe", "tiny-olmoe", "tiny-glm4_moe", "tiny-dots1")


def mixtures_of(model):
    """Block -> its module with router and experts."""
    row = architecture_of(model.config.to_dict())
    blocks = enumerate(model.get_submodule(row.blocks))
    return {number: block.mlp for number, block in blocks if hasattr(block.mlp, "experts")}


@contextmanager
def without(model, gone):
    """As long as this holds, the router logits of the experts ``gone`` (by block) are -inf."""
    whole = torch.nn.functional.linear
    routers = {mixture.gate.weight.data_ptr(): gone[block] for block, mixture in mixtures_of(model).items()}
    biases = []
    for block, mixture in mixtures_of(model).items():
        if hasattr(mixture.gate, "e_score_correction_bias"):  # a sigmoid of -inf is 0, and the bias could still win
            biases.append((mixture.gate.e_score_correction_bias, mixture.gate.e_score_correction_bias.clone()))
            biases[-1][0][gone[block]] = -torch.inf

    def linear(x, weight, bias=None):
        result = whole(x, weight, bias)
        if weight.data_ptr() in routers:
            result[..., routers[weight.data_ptr()]] = -torch.inf
        return result

    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = whole
        for bias, old in biases:
            bias.copy_(old)
