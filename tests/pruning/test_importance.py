import pytest
import torch

from sparse_ft.pruning.importance import Statistics, score, with_floor


@pytest.fixture
def weight():
    return torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])


def test_named_importances(weight):
    norm = torch.tensor([2.0, 1.0, 0.0])
    about = Statistics("w", input_norm=norm, mean_abs_gradient=weight + 5, mean_abs_product=weight + 7)
    assert torch.equal(score("magnitude", weight, about), weight.abs())
    assert torch.equal(score("wanda", weight, about), weight.abs() * norm)
    assert torch.equal(score("gradient", weight, about), weight + 5)
    assert torch.equal(score("taylor", weight, about), weight + 7)


def test_a_users_own_importance(weight):
    assert torch.equal(score(lambda w, s: w**2, weight, Statistics("w")), weight**2)


@pytest.mark.parametrize("wrong", [lambda w, s: w.sum(), lambda w, s: w > 0, lambda w, s: 3.0])
def test_a_users_own_importance_must_give_scores(weight, wrong):
    with pytest.raises(ValueError, match=r"must return float scores of shape \(2, 3\) for w"):
        score(wrong, weight, Statistics("w"))


def test_what_no_token_reached_is_ordered_by_magnitude_below_the_rest():
    weight = torch.randn(3, 4, 5)
    scores = torch.rand(3, 4, 5) * 1e-6 + 1e-20
    scores[1] = 0
    fixed, needed = with_floor(scores, weight)
    assert needed
    assert torch.equal(fixed[[0, 2]], scores[[0, 2]])
    assert fixed[1].max() < scores[[0, 2]].min()
    assert torch.equal(fixed[1].flatten().argsort(), weight[1].abs().flatten().argsort())
    assert with_floor(scores[:1], weight[:1])[1] is False
