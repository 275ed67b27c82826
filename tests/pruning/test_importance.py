import pytest
import torch

from sparse_ft.pruning.importance import Statistics, score, with_floor
from sparse_ft.pruning.rules import load
from sparse_ft.settings.rules import EXPERTS, HESSIANS, RULES, UPDATES


@pytest.fixture
def weight():
    return torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])


def test_named_importances(weight):
    norm = torch.tensor([2.0, 1.0, 0.0])
    about = Statistics("w", input_norm=norm, mean_abs_gradient=weight + 5, mean_abs_product=weight + 7)
    expected = {
        "magnitude": weight.abs(), "wanda": weight.abs() * norm, "gradient": weight + 5, "taylor": weight + 7,
    }  # fmt: skip
    of_weights = {name for name, rule in RULES.items() if rule.needs != HESSIANS and rule.methods != (EXPERTS,)}
    assert set(expected) == of_weights
    for name, scores in expected.items():
        assert torch.equal(score(load(RULES[name].function), weight, about), scores)


def test_every_row_names_a_function_and_an_update():
    for rule in RULES.values():
        assert callable(load(rule.function)) and rule.update in UPDATES
    assert all(callable(load(update.function)) for update in UPDATES.values() if update.changes_weights)


def test_a_users_own_importance(weight):
    assert torch.equal(score(lambda w, s: w**2, weight, Statistics("w")), weight**2)


@pytest.mark.parametrize("wrong", [lambda w, s: w.sum(), lambda w, s: w > 0, lambda w, s: 3.0])
def test_a_users_own_importance_must_give_scores(weight, wrong):
    with pytest.raises(ValueError, match=r"must return float scores of shape \(2, 3\) for w"):
        score(wrong, weight, Statistics("w"))


def test_what_no_token_reached_is_ordered_by_magnitude_below_the_rest():
    weight, reached = torch.randn(4, 5), torch.rand(4, 5) * 1e-6 + 1e-20
    fixed, needed = with_floor(torch.zeros(4, 5), weight)
    assert needed and fixed.max() < reached.min()
    assert torch.equal(fixed.flatten().argsort(), weight.abs().flatten().argsort())
    same, needed = with_floor(reached, weight)
    assert same is reached and not needed
