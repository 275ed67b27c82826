"""Swaps against all pairs of every row tried out one after the other."""

import pytest
import torch

from sparse_ft.pruning.patterns import group_mask, row_mask
from sparse_ft.pruning.rules import Inputs
from sparse_ft.pruning.swaps import refine, swap_together, swap_weights

WAYS = [swap_weights, swap_together]


def problem(rows=6, columns=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=dtype) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, x.T @ x, torch.rand(rows, columns, generator=generator) < 0.2


def errors(weight, mask, gram):
    lost = weight.double() * ~mask
    return ((lost @ gram.double()) * lost).sum(1)


def start(weight, gram, group):
    scores = weight.abs() * gram.diagonal().sqrt()
    half = weight.shape[1] // 2
    return row_mask(scores, half) if group is None else group_mask(scores, group // 2, group)


def tried_out(weight, mask, gram, group, locked, limit):
    mask, taken = mask.clone(), 0
    columns = range(weight.shape[1])
    for row in range(len(weight)):
        for _ in range(limit):
            best, pair = float(errors(weight[row : row + 1], mask[row : row + 1], gram)) * (1 - 1e-7), None
            for u in columns:
                for p in columns:
                    if not mask[row, u] or mask[row, p] or locked[row, p] or u // group != p // group:
                        continue
                    other = mask[row : row + 1].clone()
                    other[0, u], other[0, p] = False, True
                    error = float(errors(weight[row : row + 1], other, gram))
                    if error < best:
                        best, pair = error, (u, p)
            if pair is None:
                break
            mask[row, pair[0]], mask[row, pair[1]] = False, True
            taken += 1
    return mask, taken


@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_every_step_is_the_best_of_all_pairs(way, group):
    weight, gram, locked = problem(rows=4, columns=16)
    mask = start(weight, gram, group)
    for limit in (1, 2, 3, 100):
        for pruned in (None, locked & ~mask):
            oracle = torch.zeros_like(mask) if pruned is None else pruned
            new, taken = way(weight, mask, gram, group, pruned, limit)
            expected, count = tried_out(weight, mask, gram, group or 16, oracle, limit)
            assert torch.equal(new, expected)
            assert taken == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [None, 4, 16])
@pytest.mark.parametrize("way", WAYS)
def test_errors_only_fall_and_counts_stay(way, group, dtype):
    for seed in range(5):
        weight, gram, locked = problem(20, 64, seed, dtype)
        mask = start(weight, gram, group)
        copy = mask.clone()
        before = errors(weight, mask, gram)
        for limit in (1, 5, 100):
            new, taken = way(weight, mask, gram, group, locked & ~mask, limit)
            after = errors(weight, new, gram)
            assert (after <= before).all()
            assert (before > after).sum() <= taken <= limit * 20
            assert torch.equal(new.view(20, -1, group or 64).sum(2), mask.view(20, -1, group or 64).sum(2))
            assert not (new & locked & ~mask).any()
            before = after
        assert after.sum() < 0.9 * errors(weight, mask, gram).sum()
        assert torch.equal(mask, copy)


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_that_no_swap_betters_stays(way):
    weight, gram, _ = problem()
    mask, taken = way(weight, start(weight, gram, None), gram)
    assert taken > 0
    again, more = way(weight, mask, gram)
    assert more == 0
    assert torch.equal(again, mask)
    for full in (torch.ones_like(mask), torch.zeros_like(mask)):
        same, none = way(weight, full, gram)
        assert none == 0
        assert torch.equal(same, full)


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_dead_inputs_make_room(way):
    weight, gram, _ = problem()
    gram[3] = 0
    gram[:, 3] = 0
    mask = start(weight, gram, None)
    mask[:, 3], mask[:, 4] = True, False
    new, _ = way(weight, mask, gram)
    assert not new[:, 3].any()


def test_rows_are_shared_out_where_memory_is_short(monkeypatch):
    weight, gram, _ = problem()
    mask = start(weight, gram, None)
    whole = swap_together(weight, mask, gram)
    monkeypatch.setattr("sparse_ft.pruning.swaps._PAIRS", 2 * 16 * 16)
    parts = swap_together(weight, mask, gram)
    assert torch.equal(whole[0], parts[0])
    assert whole[1] == parts[1]


def test_a_level_above_a_bettered_one_begins_with_what_that_pruned():
    weight, gram, _ = problem(rows=10, columns=32, dtype=torch.float32)
    scores, notes = weight.abs(), []
    inputs = Inputs(gram, 96, 32, gram.device, notes.append)
    low, high = (row_mask(scores, k) for k in (8, 10))
    below = refine(weight, low, inputs)
    assert not torch.equal(below, low) and bool((high & ~below).any())
    above = refine(weight, high, inputs, pruned=~below)
    assert not (above & ~below).any() and (above.sum(1) == 22).all()
    # Of what the mask prunes, the rest of the row is filled up with the smallest |w| ||x||, and then bettered.
    filled = high & below
    for row in range(10):
        order = (weight[row].abs() * gram.diagonal().sqrt()).argsort()
        free = [c for c in order.tolist() if below[row, c] and not high[row, c]]
        missing = 10 - int((~below[row]).sum())
        filled[row] = below[row].clone()
        filled[row, free[:missing]] = False
    expected, _ = swap_weights(weight, filled, gram, None, ~below)
    assert torch.equal(above, expected) and notes == []


def test_without_a_token_a_mask_stays_and_levels_are_nested_still():
    weight, _, _ = problem(rows=6, columns=16, dtype=torch.float32)
    notes = []
    inputs = Inputs(None, 0, 16, weight.device, notes.append)
    kept = row_mask(weight.abs(), 8)
    assert torch.equal(refine(weight, kept, inputs), kept)
    pruned = ~row_mask(-weight.abs(), 3)  # the largest ones went below
    nested = refine(weight, kept, inputs, pruned=pruned)
    assert not (nested & pruned).any() and (nested.sum(1) == 8).all()
    assert set(notes) == {"no calibration token came here; its mask is not refined"}
