"""ALPS against the paper's algorithm written out in float64 with an eigendecomposition and sorts, and SparseGPT."""

import pytest
import torch
from errors import output_error

from sparse_ft.pruning.alps import alps, choose, kept_inverses
from sparse_ft.pruning.hessian import Normalised, normalise
from sparse_ft.pruning.patterns import group_mask
from sparse_ft.pruning.rules import Inputs
from sparse_ft.pruning.sparsegpt import inverse_factor, prune_columns

KINDS = ("even", "mixed", "uneven", "few tokens")


def problem(rows=16, columns=32, kind="mixed", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = normal(columns // 2 if kind == "few tokens" else 8 * columns, columns)
    x = x if kind == "even" else x @ normal(columns, columns)
    x = x * normal(columns).exp() if kind == "uneven" else x
    return normal(rows, columns), x.T @ x


def direct_projection(values, k, pattern):
    flat = values.abs().view(1, -1) if pattern is None else values.abs().view(-1, pattern[1])
    lowest = flat.argsort(dim=1, stable=True)[:, : k if pattern is None else pattern[1] - pattern[0]]
    return values * torch.ones_like(flat).scatter(1, lowest, 0).view(values.shape)


def direct(weight, hessian, k, pattern):
    """Meng et al., algorithm 1 with the penalty of their section 3.2; every row's normal equations at the end."""
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    scale = hessian.diagonal().sqrt()
    matrix, dense = hessian / scale / scale[:, None], weight * scale
    values, vectors = torch.linalg.eigh(matrix)
    kept = weight.numel() - k if pattern is None else weight.numel() * pattern[0] // pattern[1]
    rho, moved, d, v = 0.1, False, direct_projection(dense, k, pattern), torch.zeros_like(dense)
    last = d != 0
    for iteration in range(1, 301):
        b = (dense @ matrix - v + rho * d) @ vectors @ torch.diag(1 / (values + rho)) @ vectors.T
        d = direct_projection(b + v / rho, k, pattern)
        v = v + rho * (b - d)
        if iteration % 3 == 0:
            change, last = int(((d != 0) != last).sum()) / kept, d != 0
            moved = moved or change > 0.005
            if not moved and rho < 1e-3:
                break
            if not moved:
                rho, d, v = rho / 5, direct_projection(dense, k, pattern), torch.zeros_like(dense)
                last = d != 0
            elif change < 3e-4:
                break
            else:
                rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    mask = direct_projection(b, k, pattern) != 0
    new = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        new[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight[row])[kept])
    return new, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [0.3, 0.7, 0.95, (2, 4), (1, 4), (5, 8)])
def test_supports_are_those_of_the_paper_in_float64(kind, what):
    weight, hessian = problem(kind=kind)
    weight = weight.T.contiguous().T  # however it lies in memory
    pattern, k = (what, 0) if isinstance(what, tuple) else (None, round(what * weight.numel()))
    parts = normalise(hessian)
    copies = weight.clone(), parts.matrix.clone()
    new, kept = alps(weight, parts, k, pattern)
    assert torch.equal(weight, copies[0])
    assert torch.equal(parts.matrix, copies[1])
    oracle, mask = direct(weight.double().contiguous(), hessian.double(), k, pattern)
    assert torch.equal(kept, mask)
    assert (new[~kept] == 0).all()
    best = output_error(oracle.float(), weight, parts)
    assert output_error(new, weight, parts) == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_never_behind_sparsegpt(kind):
    choices = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, (2, 4), (1, 4), (4, 8)]
    for seed in range(50):
        what = choices[seed % len(choices)]
        weight, hessian = problem(8 + seed % 3 * 8, 16 + seed % 4 * 8, kind, seed)
        pattern, k = (what, 0) if isinstance(what, tuple) else (None, round(what * weight.numel()))
        parts, (factor, dead, _) = normalise(hessian), inverse_factor(hessian)
        rival, other = prune_columns(weight, factor, dead, k, pattern)
        new, kept = alps(weight, parts, k, pattern)
        assert kept.sum() == other.sum()
        assert output_error(new, weight, parts) <= output_error(rival, weight, parts), (seed, what)


@pytest.mark.parametrize("k", [0, 1, 17, 256, 511, 512])
def test_counts_are_exact(k):
    weight, hessian = problem()
    new, kept = alps(weight, normalise(hessian), k)
    assert int((~kept).sum()) == k
    assert (new[~kept] == 0).all()
    if k == 0:
        assert torch.equal(new, weight)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 4), (3, 16), (1, 32)])
def test_groups_are_exact(pattern):
    weight, hessian = problem()
    new, kept = alps(weight, normalise(hessian), pattern=pattern)
    assert (kept.view(-1, pattern[1]).sum(1) == pattern[0]).all()
    assert (new[~kept] == 0).all()


def test_levels_are_nested_and_exact():
    weight, hessian = problem()
    parts, before = normalise(hessian), None
    for k in (0, 20, 21, 200, 201, 500, 512):
        new, kept = alps(weight, parts, k, pruned=before)
        assert int((~kept).sum()) == k
        assert (new[~kept] == 0).all()
        if before is not None:
            assert not (kept & before).any()
        before = ~kept


def test_dead_inputs_go_first_and_those_that_stay_keep_their_weights():
    weight, hessian = problem()
    hessian[[3, 11]] = 0
    hessian[:, [3, 11]] = 0
    live = [c for c in range(32) if c not in (3, 11)]
    _, kept = alps(weight, normalise(hessian), 200)
    assert not kept[:, [3, 11]].any()
    assert torch.equal(kept[:, live], alps(weight[:, live], normalise(hessian[live][:, live]), 200 - 32)[1])
    new, kept = alps(weight, normalise(hessian), 20)
    assert kept[:, live].all()
    assert torch.equal(new[kept & (hessian.diagonal() == 0)], weight[kept & (hessian.diagonal() == 0)])
    torch.testing.assert_close(new[:, live], weight[:, live], rtol=1e-4, atol=1e-4)


def test_inputs_that_nothing_binds_together_lose_about_the_smallest_weights():
    weight, _ = problem(64, 64)
    parts = normalise(torch.eye(64))
    new, kept = alps(weight, parts, 2000)
    smallest = weight * (weight.abs() > weight.abs().flatten().sort().values[1999])  # the optimum
    assert output_error(new, weight, parts) < 1.02 * output_error(smallest, weight, parts)
    torch.testing.assert_close(new, weight * kept)


def test_where_no_token_came_the_smallest_weights_go_and_the_others_stay_as_they_are():
    weight, hessian = problem()
    nothing = normalise(torch.zeros_like(hessian))
    new, kept = alps(weight, nothing, 300)
    assert torch.equal(kept, weight.abs() > weight.abs().flatten().sort().values[299])
    assert torch.equal(new, weight * kept)
    new, kept = alps(weight, nothing, pattern=(2, 4))
    assert torch.equal(kept, group_mask(weight.abs(), 2, 4))
    assert torch.equal(new, weight * kept)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_matrices_that_share_inputs_share_factorisations_and_come_out_as_each_alone(monkeypatch, pattern):
    _, hessian = problem()
    weights = [problem(rows, seed=seed)[0] for seed, rows in enumerate((32, 16, 16))]
    factorised, cholesky = [], torch.linalg.cholesky_ex

    def counted(matrix):
        factorised.append(matrix)
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    parts = normalise(hessian)
    apart = [alps(weight, parts, weight.numel() // 2, pattern) for weight in weights]
    alone = len(factorised)
    notes = []
    inputs = Inputs(hessian, 32, 32, hessian.device, notes.append)
    together = [choose(weight, inputs, weight.numel() // 2, pattern) for weight in weights]
    for (left, mask), (right, other) in zip(apart, together, strict=True):
        assert torch.equal(mask, other) and torch.equal(left, right)
    assert len(factorised) - alone < 0.7 * alone and notes == []


def test_no_more_inverses_are_kept_than_there_is_room_for():
    parts = normalise(problem()[1])
    inverses = kept_inverses(parts.matrix, room=2 * parts.matrix.nbytes)
    found = [inverses(penalty) for penalty in (0.1, 0.2, 0.3)]
    again = [inverses(penalty) for penalty in (0.1, 0.2, 0.3)]
    assert [one is other for one, other in zip(found, again, strict=True)] == [True, True, False]
    assert torch.equal(found[2], again[2])


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_where_there_is_no_hessian_magnitudes_decide_and_that_is_said(pattern):
    weight, _ = problem()
    notes, k = [], 0 if pattern else 300
    inputs = Inputs(None, 0, 32, weight.device, notes.append)
    new, kept = choose(weight, inputs, k, pattern)
    oracle, mask = alps(weight, normalise(torch.zeros(32, 32)), k, pattern)
    assert torch.equal(kept, mask) and torch.equal(new, oracle)
    before = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    if pattern is None:
        _, nested = choose(weight, inputs, k, pruned=before)
        assert int((~nested).sum()) == 300 and not (nested & before).any()
    assert set(notes) == {"no calibration token came here; pruned by magnitude, without weight update"}


def test_a_hessian_that_cannot_be_factorised_is_an_error():
    weight, hessian = problem()
    parts = normalise(hessian)
    broken = Normalised(parts.matrix - 5 * torch.eye(32), parts.scale, parts.dead, parts.damping)
    with pytest.raises(RuntimeError, match="cannot be factorised"):
        alps(weight, broken, 200)
