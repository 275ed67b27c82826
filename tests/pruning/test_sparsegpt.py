"""SparseGPT against the paper's formulas written out with dense inverses, in float64."""

import pytest
import torch

from sparse_ft.pruning.sparsegpt import inverse_factor, prune_columns, update_columns


def problem(rows=12, columns=20, tokens=60, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=dtype), x


def direct(weight, hessian, block, k=None, pattern=None, damping=0.01):
    """Frantar & Alistarh, algorithm 1: for column j the inverse of H restricted to the columns from j on."""
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(columns)]
    error = torch.stack([inverse[0, 0] for inverse in inverses])
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        if pattern is None:
            scores = weight[:, begin:end] ** 2 / error[begin:end]
            count = round(k * end / columns) - round(k * begin / columns)
            mask = torch.ones(scores.numel(), dtype=torch.bool)
            mask[scores.flatten().argsort(stable=True)[:count]] = False
            kept[:, begin:end] = mask.view(scores.shape)
        for j in range(begin, end):
            if pattern is not None and j % pattern[1] == 0:
                scores = weight[:, j : j + pattern[1]] ** 2 / error[j : j + pattern[1]]
                order = scores.argsort(dim=1, stable=True)[:, : pattern[1] - pattern[0]]
                kept[:, j : j + pattern[1]] = torch.ones_like(scores, dtype=torch.bool).scatter(1, order, False)
            change = torch.where(kept[:, j], 0, weight[:, j]) / error[j]
            weight[:, j:] -= change[:, None] * inverses[j][0]
    return weight * kept, kept


@pytest.mark.parametrize("block", [5, 8, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 1.0])
def test_weights_and_masks_are_the_papers(block, sparsity):
    weight, x = problem()
    hessian = x.T @ x
    k = round(sparsity * weight.numel())
    factor, dead, damping = inverse_factor(hessian)
    assert damping == 0.01
    new, kept = prune_columns(weight, factor, dead, k=k, block=block)
    oracle, mask = direct(weight, hessian, block, k)
    assert torch.equal(kept, mask)
    assert int((~kept).sum()) == k
    torch.testing.assert_close(new, oracle, rtol=1e-8, atol=1e-8)
    assert (new[~kept] == 0).all()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 10)])
def test_patterns_are_the_papers(pattern):
    weight, x = problem()
    hessian = x.T @ x
    factor, dead, _ = inverse_factor(hessian)
    new, kept = prune_columns(weight, factor, dead, pattern=pattern, block=7)
    oracle, mask = direct(weight, hessian, max(1, 7 // pattern[1]) * pattern[1], pattern=pattern)
    assert torch.equal(kept, mask)
    assert (kept.view(12, -1, pattern[1]).sum(-1) == pattern[0]).all()
    torch.testing.assert_close(new, oracle, rtol=1e-8, atol=1e-8)


def test_float32_is_near_and_the_output_better_than_without_update():
    weight, x = problem(rows=30, columns=40, tokens=200, dtype=torch.float32)
    factor, dead, _ = inverse_factor(x.T @ x)
    new, kept = prune_columns(weight, factor, dead, k=600)
    oracle, _ = direct(weight.double(), (x.T @ x).double(), 128, 600)
    assert (new - oracle).norm() / oracle.norm() < 1e-3
    assert (x @ (new - weight).T).norm() < 0.9 * (x @ (weight * kept - weight).T).norm()


def test_levels_are_nested_and_exact():
    weight, x = problem(rows=6)
    factor, dead, _ = inverse_factor(x.T @ x)
    before = None
    for k in (0, 20, 21, 60, 61, 100, 120):
        _, kept = prune_columns(weight, factor, dead, k=k, pruned=before, block=6)
        assert int((~kept).sum()) == k
        if before is not None:
            assert not (kept & before).any()
        before = ~kept


def test_dead_inputs_go_first_and_disturb_nothing():
    weight, x = problem()
    x[:, [3, 11]] = 0
    hessian = x.T @ x
    copy = hessian.clone()
    factor, dead, _ = inverse_factor(hessian)
    assert dead.nonzero().flatten().tolist() == [3, 11]
    assert torch.equal(hessian, copy)
    new, kept = prune_columns(weight, factor, dead, k=24, block=20)
    assert not kept[:, [3, 11]].any()
    alive = [c for c in range(20) if c not in (3, 11)]
    torch.testing.assert_close(new[:, alive], weight[:, alive])


def test_a_failed_factorisation_is_tried_again_with_more_damping():
    _, x = problem()
    hessian = x.T @ x
    hessian -= torch.linalg.eigvalsh(hessian).min() * torch.eye(20) + 0.05 * hessian.diagonal().mean() * torch.eye(20)
    assert inverse_factor(hessian)[2] == pytest.approx(0.1)


def test_a_hessian_that_is_no_number_is_an_error():
    with pytest.raises(RuntimeError, match="cannot be factorised"):
        inverse_factor(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
def test_under_a_given_mask_every_column_answers_as_the_surgeon_says(eliminated, block, share):
    weight, x = problem()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) >= share
    factor, _, _ = inverse_factor(x.T @ x)
    new = update_columns(weight, factor, kept, block)
    torch.testing.assert_close(new, eliminated(weight, kept, x.T @ x), rtol=1e-8, atol=1e-8)
    assert (new[~kept] == 0).all()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_under_its_own_mask_it_is_sparsegpt(pattern):
    weight, x = problem(rows=30, columns=40, tokens=200, dtype=torch.float32)
    factor, dead, _ = inverse_factor(x.T @ x)
    new, kept = prune_columns(weight, factor, dead, k=600, pattern=pattern)
    assert torch.equal(update_columns(weight, factor, kept), new)


@pytest.mark.parametrize("mask", ["magnitude", "wanda", "random"])
def test_under_a_given_mask_the_output_is_nearer_than_without_update(mask):
    """No theorem: a column also answers through weights that a later column loses, and of matrices of 24 inputs one in
    a hundred comes out worse (by 15 % at most in 600 of them). Of 40 inputs none in 600 did."""
    for seed in range(20):
        weight, x = problem(rows=30, columns=40, tokens=200, seed=seed, dtype=torch.float32)
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        scores = {"magnitude": weight.abs(), "wanda": weight.abs() * x.norm(dim=0), "random": noise}[mask]
        kept = scores.argsort(dim=1).argsort(dim=1) >= 20
        new = update_columns(weight, inverse_factor(x.T @ x)[0], kept)
        assert (x @ (new - weight).T).norm() < (x @ (weight * kept - weight).T).norm()
