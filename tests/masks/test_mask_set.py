import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from sparse_ft.masks.mask_set import MaskSet, count_kept, pack_bits, unpack_bits


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.rand(5, 13, generator=generator) > 0.4,
        "a.weight": torch.rand(3, 16, generator=generator) > 0.7,
        "experts": torch.rand(2, 3, 9, generator=generator) > 0.5,
    }


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 65])
def test_bits_are_little_endian_along_the_last_axis_with_padded_rows(columns):
    mask = torch.rand(4, columns) > 0.5
    packed = pack_bits(mask)
    assert packed.shape == (4, (columns + 7) // 8)
    for row in range(4):
        for column in range(columns):
            bit = int(packed[row, column // 8]) >> (column % 8) & 1
            assert bit == int(mask[row, column])
    assert torch.equal(unpack_bits(packed, columns), mask)


def test_count_kept_counts_bits(masks):
    for mask in masks.values():
        assert count_kept(pack_bits(mask)) == int(mask.sum())


def test_a_set_gives_back_its_masks_in_name_order(masks):
    packed = MaskSet.from_bool(masks, {"method": "test"})
    assert list(packed) == ["a.weight", "b.weight", "experts"]
    for name, mask in masks.items():
        assert torch.equal(packed[name], mask)
        assert packed.kept(name) == int(mask.sum())
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert (packed.n_weights, packed.n_pruned) == (total, total - kept)
    assert packed.sparsity == pytest.approx((total - kept) / total, abs=0)


def test_checksum_is_the_documented_formula(masks):
    identity = hashlib.sha256()
    for name in sorted(masks):
        bits = np.packbits(masks[name].numpy(), axis=-1, bitorder="little")
        identity.update(json.dumps([name, list(masks[name].shape)]).encode() + b"\n")
        identity.update(hashlib.sha256(bits.tobytes()).digest())
    assert MaskSet.from_bool(masks).checksum == identity.hexdigest()


def test_checksum_ignores_order_and_metadata_but_no_bit_name_or_shape(masks):
    checksum = MaskSet.from_bool(masks).checksum
    assert MaskSet.from_bool(dict(reversed(masks.items())), {"seed": 1}).checksum == checksum
    flipped = {name: mask.clone() for name, mask in masks.items()}
    flipped["experts"][1, 2, 8] ^= True
    renamed = {name.replace("b.", "c."): mask for name, mask in masks.items()}
    reshaped = {**masks, "a.weight": masks["a.weight"].reshape(6, 8)}
    others = {MaskSet.from_bool(other).checksum for other in (flipped, renamed, reshaped)}
    assert len(others | {checksum}) == 4


def test_only_boolean_masks_are_taken():
    with pytest.raises(TypeError, match=r"a\.weight"):
        MaskSet.from_bool({"a.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("bits", "shape", "reason"),
    [
        (torch.zeros(2, 2, dtype=torch.uint8), (2, 5), "not uint8"),
        (torch.zeros(2, 1, dtype=torch.int8), (2, 5), "not uint8"),
        (torch.tensor([[0b0010_0000]], dtype=torch.uint8), (1, 5), "beyond the end"),
    ],
)
def test_bits_that_do_not_fit_are_refused(bits, shape, reason):
    with pytest.raises(ValueError, match=reason):
        MaskSet({"w": bits}, {"w": shape})


def test_a_set_survives_pickling(masks):
    packed = MaskSet.from_bool(masks, {"seed": 3})
    copy = pickle.loads(pickle.dumps(packed))
    assert copy.checksum == packed.checksum
    assert copy.metadata == {"seed": 3}


def test_all_kept_prunes_nothing():
    assert MaskSet.all_kept({"w": (3, 11)}).n_pruned == 0


def test_an_empty_set_has_sparsity_zero():
    assert MaskSet({}, {}).sparsity == 0.0
