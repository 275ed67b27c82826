import json

import torch

from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.masks.statistics import block_sparsities, mask_statistics


def test_numbers_are_those_of_the_masks():
    masks = MaskSet.from_bool(
        {"b": torch.tensor([[True, False], [False, False]]), "a": torch.ones(3, 2, 10, dtype=torch.bool)},
        {"sparsity": 0.04, "method": "random"},
    )
    numbers = mask_statistics(masks)
    assert numbers["sparsity"] == {"asked": 0.04, "achieved": 3 / 64}
    assert (numbers["weights"], numbers["pruned"]) == (64, 3)
    assert numbers["per_tensor"] == {"count": 2, "min": 0.0, "mean": 0.375, "max": 0.75}
    assert list(numbers["tensors"]) == ["a", "b"]
    assert numbers["tensors"]["b"] == {"shape": [2, 2], "weights": 4, "pruned": 3, "sparsity": 0.75}
    assert numbers["checksum"] == masks.checksum
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_an_empty_set_has_numbers_too():
    assert mask_statistics(MaskSet({}, {}))["sparsity"] == {"asked": None, "achieved": 0.0}


def test_blocks_weigh_every_weight_once():
    sizes = {"model.layers.0.self_attn.q_proj.weight": (100, 50), "model.layers.0.mlp.up_proj.weight": (300, 30),
             "model.layers.10.mlp.up_proj.weight": (300, 60), "model.layers.9.mlp.up_proj.weight": (10, 1)}  # fmt: skip
    tensors = {name: {"weights": weights, "pruned": pruned} for name, (weights, pruned) in sizes.items()}
    assert block_sparsities({"tensors": tensors}) == [80 / 400, 0.1, 0.2]
