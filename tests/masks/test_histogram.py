import numpy as np
import pytest

from sparse_ft.masks.histogram import Cut, cut_counts, cut_digits, exact_count, share_ties


def pruned(keys, cut):
    """What a cut says, weight by weight."""
    seen, result = 0, []
    for key in keys:
        equal = key == cut.key
        result.append(bool(key < cut.key or (equal and seen < cut.ties)))
        seen += equal
    return np.array(result)


@pytest.mark.parametrize("seed", range(5))
def test_cuts_prune_exactly_the_first_k_of_a_stable_sort(seed):
    keys = np.random.default_rng(seed).integers(0, 12, 60)
    ks = list(range(61))
    order = np.argsort(keys, kind="stable")
    for k, cut in zip(ks, cut_counts(np.bincount(keys, minlength=20), ks), strict=True):
        expected = np.zeros(60, bool)
        expected[order[:k]] = True
        assert np.array_equal(pruned(keys, cut), expected)


def test_two_digits_cut_where_one_wide_histogram_would():
    keys = np.random.default_rng(1).integers(0, 1 << 20, 500)
    keys[100:200] = keys[0]
    ks = [0, 1, 100, 150, 499, 500]
    coarse = cut_counts(np.bincount(keys >> 16, minlength=65536), ks)
    prefixes = sorted({cut.key for cut in coarse if cut.ties})
    fine = np.stack([np.bincount(keys[keys >> 16 == p] & 0xFFFF, minlength=65536) for p in prefixes])
    assert cut_digits(coarse, prefixes, fine) == cut_counts(np.bincount(keys, minlength=1 << 20), ks)


@pytest.mark.parametrize("k", [-1, 4])
def test_more_than_there_is_cannot_be_pruned(k):
    with pytest.raises(ValueError, match="cannot prune"):
        cut_counts(np.array([1, 2]), [k])


def test_ties_go_to_the_first_parts():
    shares = share_ties(Cut(5, 7), [3, 0, 6, 2])
    assert [cut.ties for cut in shares] == [3, 0, 4, 0]
    assert {cut.key for cut in shares} == {5}


def test_one_bound_says_it_unless_ties_are_split():
    assert Cut(5, 0).bound(9) == 5
    assert Cut(5, 9).bound(9) == 6
    assert Cut(5, 9).bound(0) == 5
    assert Cut(5, 4).bound(9) is None
    assert Cut(0, 0).bound(3) == 0


@pytest.mark.parametrize(("sparsity", "n", "k"), [(0, 7, 0), (1, 7, 7), (0.5, 7, 4), (0.5, 5, 2), (0.3, 10, 3)])
def test_counts_round_as_python_does(sparsity, n, k):
    assert exact_count(sparsity, n) == k == round(sparsity * n)
