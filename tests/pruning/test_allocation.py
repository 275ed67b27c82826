import numpy as np
import pytest
import torch

from sparse_ft.pruning.allocation import outlier_share, owl_deviations, owl_sparsities, tensor_counts

LEVELS = [0.0, 0.03, 0.1, 0.5, 0.500001, 0.9, 0.99, 1.0]
SIZES = [1000, 3000, 500, 1000]


def test_outliers_are_counted_against_the_blocks_mean():
    scores = [torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 33.0]])]  # mean 5
    assert outlier_share(scores, times=5) == 1 / 8
    assert outlier_share(scores, times=7) == 0


def test_deviations_are_the_papers():
    shares = np.array([0.01, 0.02, 0.06])
    scaled = (shares - shares.min()) * (1 / (shares.max() - shares.min()) * 0.08 * 2)
    assert np.allclose(owl_deviations(shares, 0.08), scaled - scaled.mean())
    assert not owl_deviations([0.1, 0.1], 0.08).any()


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_average_to_the_level(level):
    deviations = owl_deviations([0.01, 0.05, 0.2, 0.02], 0.08)
    values = owl_sparsities(level, deviations, SIZES)
    assert np.all((values >= 0) & (values <= 1))
    assert np.average(values, weights=SIZES) == pytest.approx(level, abs=1e-9)
    if level == 0.5:  # nothing to clip: the paper's rule, up to the blocks' different sizes
        assert np.allclose(values - values.mean(), -deviations)


def test_counts_are_exact_and_grow():
    deviations = owl_deviations([0.01, 0.05, 0.2, 0.02], 0.08)
    sizes = {f"t{i}": size for i, size in enumerate(SIZES)}
    shares = {
        f"t{i}": [float(owl_sparsities(level, deviations, SIZES)[i]) for level in LEVELS] for i in range(len(SIZES))
    }
    counts = tensor_counts(LEVELS, sizes, shares)
    for index, level in enumerate(LEVELS):
        assert sum(values[index] for values in counts.values()) == round(level * sum(SIZES))
    for name, values in counts.items():
        assert values == sorted(values)
        assert all(abs(v - share * sizes[name]) <= 2 for v, share in zip(values, shares[name], strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_counts_stay_exact_when_tensors_are_tiny_and_levels_close(seed):
    random = np.random.default_rng(seed)
    sizes = {f"t{i}": int(size) for i, size in enumerate(random.integers(1, 9, 12))}
    levels = sorted(random.random(30))
    counts = tensor_counts(levels, sizes, dict.fromkeys(sizes, levels))
    for index, level in enumerate(levels):
        assert sum(values[index] for values in counts.values()) == round(level * sum(sizes.values()))
    assert all(values == sorted(values) for values in counts.values())
