import numpy as np
import pytest

from sparse_ft.pruning import kernels


@pytest.fixture
def random():
    return np.random.default_rng(3)


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_histogram_counts_as_numpy_does(random, size):
    keys = random.integers(0, 50, size, dtype=np.uint16)
    counts = np.zeros(64, np.uint32)
    kernels.add_histogram(keys, counts)
    kernels.add_histogram(keys[:3], counts)
    assert np.array_equal(counts, np.bincount(keys, minlength=64) + np.bincount(keys[:3], minlength=64))


def test_low_digits_are_counted_for_the_asked_prefixes_only(random):
    keys = (random.integers(0, 4, 5000, dtype=np.uint32) << 16) | random.integers(0, 9, 5000, dtype=np.uint32)
    counts = np.zeros((2, 65536), np.uint32)
    kernels.add_digit_histogram(keys, np.array([1, 3]), counts)
    for row, prefix in enumerate((1, 3)):
        expected = np.bincount(keys[keys >> 16 == prefix] & 0xFFFF, minlength=65536)
        assert np.array_equal(counts[row], expected)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 70])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_packing_is_numpys_little_endian_packing(random, columns, dtype):
    keys = random.integers(0, 100, (5, columns)).astype(dtype)
    bounds = np.array([0, 50, 99, 100, 13], dtype)
    out = np.full((5, (columns + 7) // 8), 255, np.uint8)
    kernels.pack_at_least(keys, bounds, out)
    assert np.array_equal(out, np.packbits(keys >= bounds[:, None], axis=1, bitorder="little"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_ranks_are_those_of_a_stable_sort(random, dtype):
    keys = random.integers(0, 9, (6, 300)).astype(dtype)
    keys[0] = 7
    keys[1] = random.integers(0, np.iinfo(dtype).max, 300)
    ranks = np.empty(keys.shape, np.uint32)
    kernels.row_ranks(keys, ranks)
    order = np.argsort(keys, axis=1, kind="stable")
    assert np.array_equal(np.take_along_axis(ranks, order, 1), np.tile(np.arange(300), (6, 1)))


@pytest.mark.parametrize("group", [2, 4, 5, 16])
def test_group_ranks_are_those_of_a_stable_sort(random, group):
    keys = random.integers(0, 4, (3, group * 6)).astype(np.uint16)
    ranks = np.empty(keys.shape, np.uint8)
    kernels.group_ranks(keys, group, ranks)
    order = np.argsort(keys.reshape(3, 6, group), axis=2, kind="stable")
    assert np.array_equal(np.argsort(order, axis=2), ranks.reshape(3, 6, group))


def test_random_keys_are_splitmix64():
    out = np.empty(3, np.uint32)
    kernels.random_keys(np.uint64(0), np.uint64(0), out)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its first outputs for seed 0
    assert out.tolist() == [value >> 33 for value in published]


def test_random_keys_depend_on_position_alone():
    whole, tail = np.empty(100, np.uint32), np.empty(60, np.uint32)
    kernels.random_keys(np.uint64(9), np.uint64(0), whole)
    kernels.random_keys(np.uint64(9), np.uint64(40), tail)
    assert np.array_equal(whole[40:], tail)


def test_column_sums_do_not_depend_on_how_rows_come(random):
    scores = random.standard_normal((50, 33)).astype(np.float32)
    at_once, in_parts = np.zeros(33), np.zeros(33)
    kernels.add_column_sums(scores, at_once)
    for row in range(0, 50, 7):
        kernels.add_column_sums(scores[row : row + 7], in_parts)
    assert np.array_equal(at_once, in_parts)
    assert np.allclose(at_once, scores.sum(0, dtype=np.float64))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_signs_are_stripped_in_place(random, dtype):
    keys = random.integers(0, np.iinfo(dtype).max, 1000).astype(dtype)
    mask = dtype(np.iinfo(dtype).max >> 1)
    expected = keys & mask
    assert kernels.strip_signs(keys, mask) == expected.max()
    assert np.array_equal(keys, expected)
    assert kernels.strip_signs(keys[:0], mask) == 0
