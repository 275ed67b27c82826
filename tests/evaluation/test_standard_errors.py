import math

import numpy as np
import pytest

from sparse_ft.evaluation.standard_errors import ratio_standard_error


def test_samples_of_one_size_have_the_error_of_their_mean():
    totals = np.random.default_rng(0).normal(30, 4, 25)
    means = totals / 8
    assert ratio_standard_error(totals, [8] * 25) == pytest.approx(means.std(ddof=1) / 5)


def test_samples_of_many_sizes_against_the_bootstrap():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 20, 400)
    totals = rng.gamma(2.0, 1.0, 400) * sizes
    drawn = rng.integers(0, 400, (4000, 400))
    ratios = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert ratio_standard_error(totals.tolist(), sizes.tolist()) == pytest.approx(ratios.std(), rel=0.05)


def test_one_sample_has_none():
    assert math.isnan(ratio_standard_error([3.0], [2]))
