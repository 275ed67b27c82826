import numpy as np
import pytest

from sparse_ft.masks.packed import NotZeroError, kept_values, restored


def bits_of(kept):
    return np.packbits(kept, axis=-1, bitorder="little")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (700, 1999)])
def test_every_bit_of_a_kept_weight_comes_back(dtype, shape):
    rng = np.random.default_rng(0)
    kept = rng.random(shape) < 0.4
    weights = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True) * kept  # any bits: NaN, -0.0
    values = np.concatenate(list(kept_values(weights, bits_of(kept))))
    assert values.dtype == dtype and np.array_equal(values, weights[kept])
    again = restored(values, bits_of(kept), shape[1])
    assert again.dtype == dtype and np.array_equal(again, weights)


def test_a_pruned_weight_that_is_no_zero_is_said_with_its_place():
    weights, kept = np.zeros((4, 9), np.uint16), np.zeros((4, 9), bool)
    weights[2, 3] = weights[3, 1] = 0x8000  # -0.0
    weights[0, 0], kept[0, 0] = 7, True
    with pytest.raises(NotZeroError) as error:
        list(kept_values(weights, bits_of(kept)))
    assert (error.value.count, error.value.first) == (2, (2, 3))


def test_values_of_another_mask_are_refused():
    with pytest.raises(ValueError, match="3 values for 2 weights"):
        restored(np.ones(3, np.uint16), bits_of(np.array([[True, True, False]])), 3)
