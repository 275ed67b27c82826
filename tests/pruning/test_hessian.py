import pytest
import torch
from errors import output_error

from sparse_ft.pruning.hessian import damping_for, normalise


def inputs(tokens=60, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix


def test_scale_and_matrix_are_the_damped_hessian():
    hessian = inputs().T @ inputs()
    copy = hessian.clone()
    parts = normalise(hessian, damping=0.1)
    assert torch.equal(hessian, copy)
    assert (parts.matrix.diagonal() == 1).all()
    assert not parts.dead.any()
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(parts.matrix * parts.scale * parts.scale[:, None], damped)


def test_dead_inputs_are_alone_and_do_not_lower_the_damping():
    x = inputs()
    alone = normalise(x.T @ x)
    wide = torch.zeros(60, 23, dtype=torch.float64)
    wide[:, 3:] = x
    parts = normalise(wide.T @ wide)
    assert parts.dead.nonzero().flatten().tolist() == [0, 1, 2]
    assert torch.equal(parts.matrix[:3], torch.eye(23, dtype=torch.float64)[:3])
    assert torch.equal(parts.scale[:3], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(parts.matrix[3:, 3:], alone.matrix)
    torch.testing.assert_close(parts.scale[3:], alone.scale)


def test_experts_are_normalised_one_by_one():
    hessians = torch.stack([inputs(seed=seed).T @ inputs(seed=seed) for seed in range(3)])
    hessians[1] = 0  # no token came here
    together = normalise(hessians)
    for index in range(3):
        alone = normalise(hessians[index])
        assert torch.equal(together.matrix[index], alone.matrix)
        assert torch.equal(together.scale[index], alone.scale)
        assert torch.equal(together.dead[index], alone.dead)
    assert together.dead[1].all()
    assert torch.equal(together.matrix[1], torch.eye(20, dtype=torch.float64))


def test_few_tokens_are_damped_more():
    assert damping_for(4000, 20) == damping_for(20, 20) == 0.01
    assert damping_for(5, 20) == pytest.approx(0.04)
    assert damping_for(0, 20) == damping_for(1, 20) == pytest.approx(0.2)


def test_the_error_is_the_outputs():
    x, generator = inputs(), torch.Generator().manual_seed(1)
    old, new = (torch.randn(7, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    hessian = x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)
    expected = float(((new - old) @ damped @ (new - old).T).trace())
    assert output_error(new, old, normalise(hessian)) == pytest.approx(expected)
    assert output_error(new, old, normalise(hessian, damping=0)) == pytest.approx(
        float((x @ (new - old).T).norm() ** 2)
    )


def test_a_hessian_that_is_no_number_is_an_error():
    with pytest.raises(RuntimeError, match="NaN or infinities"):
        normalise(torch.full((3, 3), float("nan")))
