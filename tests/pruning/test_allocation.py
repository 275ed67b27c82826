import numpy as np
import pytest
import torch

from sparse_ft.pruning.allocation import (
    dlp_deviations,
    middle_score,
    outlier_share,
    owl_deviations,
    sparsities_at,
    tensor_counts,
)

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
    values = sparsities_at(level, deviations, SIZES)
    assert np.all((values >= 0) & (values <= 1))
    assert np.average(values, weights=SIZES) == pytest.approx(level, abs=1e-9)
    if level == 0.5:  # nothing to clip: the paper's rule, up to the blocks' different sizes
        assert np.allclose(values - values.mean(), -deviations)


def test_counts_are_exact_and_grow():
    deviations = owl_deviations([0.01, 0.05, 0.2, 0.02], 0.08)
    sizes = {f"t{i}": size for i, size in enumerate(SIZES)}
    shares = {
        f"t{i}": [float(sparsities_at(level, deviations, SIZES)[i]) for level in LEVELS] for i in range(len(SIZES))
    }
    counts = tensor_counts(LEVELS, sizes, shares)
    for index, level in enumerate(LEVELS):
        assert sum(values[index] for values in counts.values()) == round(level * sum(SIZES))
    for name, values in counts.items():
        assert values == sorted(values)
        assert all(abs(v - share * sizes[name]) <= 2 for v, share in zip(values, shares[name], strict=True))


@pytest.mark.parametrize("sizes", [[(1, 1)], [(3, 4), (2, 5)], [(40, 50), (1, 1), (30, 7)], [(2, 3, 4)]])
def test_the_middle_score_is_the_median(sizes):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(size, generator=generator).abs() for size in sizes]
    assert middle_score(scores) == float(torch.cat([score.flatten() for score in scores]).median())
    ties = [torch.randint(0, 3, size, generator=generator).float() for size in sizes]
    assert middle_score(ties) == float(torch.cat([score.flatten() for score in ties]).median())


def test_dlp_is_the_papers():
    medians = torch.tensor([0.3, 0.1, 0.7, 0.4], dtype=torch.float64)
    importance = 1 - medians / medians.sum()  # their get_dlp_ratios, densities around 1 - sparsity
    scaled = (importance - importance.min()) * (1 / (importance.max() - importance.min()) * 0.15 * 2)
    densities = scaled - scaled.mean() + (1 - 0.7)
    assert np.allclose(1 - sparsities_at(0.7, dlp_deviations(medians.tolist(), 0.15), [1000] * 4), densities)
    assert not dlp_deviations([0.1, 0.1], 0.15).any()
    assert not dlp_deviations([0.0, 0.0], 0.15).any()


def test_dlp_gives_exact_sums_that_grow():
    deviations = dlp_deviations([0.2, 0.05, 0.3, 0.1], 0.15)
    sizes = {f"t{i}": size for i, size in enumerate(SIZES)}
    values = np.array([sparsities_at(level, deviations, SIZES) for level in LEVELS])
    counts = tensor_counts(LEVELS, sizes, {name: values[:, i].tolist() for i, name in enumerate(sizes)})
    for index, level in enumerate(LEVELS):
        assert sum(numbers[index] for numbers in counts.values()) == round(level * sum(SIZES))
    assert all(numbers == sorted(numbers) for numbers in counts.values())
    assert counts["t1"][3] / 3000 < 0.5 < counts["t2"][3] / 500  # the lower the median, the denser


@pytest.mark.parametrize("seed", range(4))
def test_counts_stay_exact_when_tensors_are_tiny_and_levels_close(seed):
    random = np.random.default_rng(seed)
    sizes = {f"t{i}": int(size) for i, size in enumerate(random.integers(1, 9, 12))}
    levels = sorted(random.random(30))
    counts = tensor_counts(levels, sizes, dict.fromkeys(sizes, levels))
    for index, level in enumerate(levels):
        assert sum(values[index] for values in counts.values()) == round(level * sum(sizes.values()))
    assert all(values == sorted(values) for values in counts.values())
