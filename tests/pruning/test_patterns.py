import pytest
import torch
from torch.nn.utils import prune

from sparse_ft.errors import UserError
from sparse_ft.pruning import compute_random_mask, compute_structured_mask, compute_unstructured_mask
from sparse_ft.pruning.patterns import group_mask, layer_mask, row_mask, unstructured_masks


@pytest.fixture
def layers():
    torch.manual_seed(4)
    return {f"layer{i}": torch.nn.Linear(31, 17 + i) for i in range(3)}


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 1.0])
def test_layers_agree_with_torchs_own_pruning(layers, sparsity):
    for layer in layers.values():
        ours = compute_unstructured_mask(layer.weight, sparsity)
        theirs = prune.l1_unstructured(layer, "weight", amount=sparsity).weight_mask
        assert torch.equal(ours, theirs.bool())


@pytest.mark.parametrize("sparsity", [0.37, 0.9])
def test_one_threshold_agrees_with_torchs_own_pruning(layers, sparsity):
    scores = {name: layer.weight.abs() for name, layer in layers.items()}
    ours = unstructured_masks(scores, [sparsity], "global")[0]
    prune.global_unstructured([(layer, "weight") for layer in layers.values()], prune.L1Unstructured, amount=sparsity)
    for name, layer in layers.items():
        assert torch.equal(ours[name], layer.weight_mask.bool())


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_levels_are_nested_and_exact(scope):
    torch.manual_seed(1)
    scores = {"a": torch.randint(0, 4, (9, 20)).float(), "b": torch.randn(2, 5, 10)}
    levels = [0.0, 0.3, 0.31, 0.7, 1.0]
    previous = None
    for level, masks in zip(levels, unstructured_masks(scores, levels, scope), strict=True):
        if scope == "global":
            assert sum(int((~mask).sum()) for mask in masks.values()) == round(level * 280)
        for name, mask in masks.items():
            if scope == "layer":
                assert int((~mask).sum()) == round(level * mask.numel())
            elif scope == "row":
                assert ((~mask).sum(-1) == round(level * mask.shape[-1])).all()
            if previous is not None:
                assert not (mask & ~previous[name]).any()
        previous = masks


def test_a_half_precision_score_is_compared_as_it_is(lowest):
    scores = torch.randn(40, 50).bfloat16()
    assert torch.equal(layer_mask(scores, 777), lowest(scores, 777))


def test_earlier_weights_go_first():
    scores = torch.arange(12.0).view(2, 6)
    before = torch.zeros(2, 6, dtype=torch.bool)
    before[1, 5] = True
    assert (~layer_mask(scores, 2, before)).nonzero().tolist() == [[0, 0], [1, 5]]
    assert (~row_mask(scores, 2, before)).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 5]]


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="do not divide 10"):
        group_mask(torch.ones(2, 10), 2, 4)


def test_whole_rows_and_columns():
    weight = torch.tensor([[1.0, 1, 1], [5, -5, 5], [0, 0, 9], [2, 2, 2]])
    assert compute_structured_mask(weight, 0.5, axis=0).all(1).tolist() == [False, True, True, False]
    columns = compute_structured_mask(weight, 1 / 3, axis=1)
    assert (~columns).all(0).sum() == 1
    assert columns.any(0).sum() == 2


def test_random_masks_are_exact_seeded_and_of_no_pattern():
    mask = compute_random_mask((40, 50), 0.3, seed=1, name="w")
    assert int((~mask).sum()) == 600
    assert torch.equal(mask, compute_random_mask((40, 50), 0.3, seed=1, name="w"))
    assert not torch.equal(mask, compute_random_mask((40, 50), 0.3, seed=2, name="w"))
    assert not (compute_random_mask((40, 50), 0.5, 1, "w") & ~mask).any()
    by_row = (~compute_random_mask((1000, 100), 0.5, seed=3)).float().mean(1)
    assert abs(by_row.std().item() - 0.05) < 0.005  # binomial: sqrt(0.25 / 100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_without_order_are_refused(bad):
    with pytest.raises(UserError, match="NaN or infinite"):
        layer_mask(torch.tensor([[1.0, bad]]), 1)
