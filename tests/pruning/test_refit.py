"""Refit against the normal equations of every row, solved by themselves in float64."""

import pytest
import torch
from errors import output_error

from sparse_ft.pruning.hessian import normalise
from sparse_ft.pruning.patterns import group_mask, layer_mask, row_mask
from sparse_ft.pruning.refit import refit
from sparse_ft.pruning.sparsegpt import inverse_factor, update_columns


def problem(rows=12, columns=24, tokens=60, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=dtype), x.T @ x


def masks(weight, hessian):
    scores = weight.abs() * hessian.diagonal().sqrt()
    columns = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(3)) < 0.5
    uneven = layer_mask(scores, weight.numel() * 7 // 10)
    uneven[0], uneven[1] = False, True
    return {
        "row": row_mask(scores, weight.shape[1] // 2),
        "layer, one row empty, one full": uneven,
        "2:4": group_mask(scores, 2, 4),
        "columns": columns.expand_as(weight),
        "random": torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.3,
    }


@pytest.mark.parametrize("kind", ["row", "layer, one row empty, one full", "2:4", "columns", "random"])
def test_every_row_is_the_least_squares_optimum(least_squares, kind):
    weight, hessian = problem()
    mask = masks(weight, hessian)[kind]
    copies = weight.clone(), mask.clone()
    new = refit(weight, mask, normalise(hessian), iterations=200, tolerance=1e-10)
    assert torch.equal(weight, copies[0])
    assert torch.equal(mask, copies[1])
    assert (new[~mask] == 0).all()
    torch.testing.assert_close(new, least_squares(weight, mask, hessian), rtol=1e-6, atol=1e-6)


def test_nothing_kept_and_all_kept():
    weight, hessian = problem()
    parts = normalise(hessian)
    assert not refit(weight, torch.zeros_like(weight, dtype=torch.bool), parts).any()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[[1, 4]] = True
    assert torch.equal(refit(weight, mask, parts)[[1, 4]], weight[[1, 4]])
    assert torch.equal(refit(weight, torch.ones_like(mask), parts), weight)


def test_float32_comes_near_the_optimum_within_its_iterations(least_squares):
    weight, hessian = problem(rows=40, columns=64, tokens=600, dtype=torch.float32)
    mask, parts = masks(weight, hessian)["row"], normalise(hessian)
    best = output_error(least_squares(weight.double(), mask, hessian.double()).float(), weight, parts)
    assert output_error(refit(weight, mask, parts), weight, parts) < 1.05 * best
    assert output_error(weight * mask, weight, parts) > 2 * best


@pytest.mark.parametrize("kind", ["row", "2:4", "columns", "random"])
def test_it_is_never_behind_sparsegpts_update(kind):
    for seed in range(20):
        weight, hessian = problem(rows=20, columns=48, tokens=400, seed=seed, dtype=torch.float32)
        mask, parts = masks(weight, hessian)[kind], normalise(hessian)
        greedy = update_columns(weight, inverse_factor(hessian)[0], mask)
        assert output_error(refit(weight, mask, parts), weight, parts) < output_error(greedy, weight, parts)


def test_it_ends_where_it_is_told_to():
    weight, hessian = problem()
    mask, parts = masks(weight, hessian)["row"], normalise(hessian)
    torch.testing.assert_close(refit(weight, mask, parts, iterations=0), weight * mask)
    torch.testing.assert_close(refit(weight, mask, parts, tolerance=1e3), weight * mask)
    errors = [output_error(refit(weight, mask, parts, 100, tolerance), weight, parts) for tolerance in (1, 0.1, 1e-6)]
    assert errors[0] > errors[1] > errors[2]
    errors = [output_error(refit(weight, mask, parts, count, 0), weight, parts) for count in range(8)]
    assert errors == sorted(errors, reverse=True)


def test_dead_inputs_keep_their_weights_and_disturb_nothing():
    weight, hessian = problem()
    hessian[[3, 11]] = 0
    hessian[:, [3, 11]] = 0
    mask = masks(weight, hessian)["random"]
    new = refit(weight, mask, normalise(hessian), 200, 1e-10)
    assert torch.equal(new[:, [3, 11]], (weight * mask)[:, [3, 11]])
    live = [c for c in range(24) if c not in (3, 11)]
    alone = refit(weight[:, live], mask[:, live], normalise(hessian[live][:, live]), 200, 1e-10)
    torch.testing.assert_close(new[:, live], alone, rtol=1e-6, atol=1e-6)


def test_experts_are_refitted_together_as_each_alone(least_squares):
    problems = [problem(seed=seed) for seed in range(3)]
    weight, hessian = (torch.stack(parts) for parts in zip(*problems, strict=True))
    hessian[1] = 0  # no token came here
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    new = refit(weight, mask, normalise(hessian), 200, 1e-10)
    for index in (0, 2):
        oracle = least_squares(weight[index], mask[index], hessian[index])
        torch.testing.assert_close(new[index], oracle, rtol=1e-6, atol=1e-6)
    assert torch.equal(new[1], weight[1] * mask[1])
