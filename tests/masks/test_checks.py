import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet


@pytest.fixture
def masks():
    return MaskSet.from_bool({"a.weight": torch.ones(2, 3, dtype=torch.bool), "b.weight": torch.ones(4, 5) > 0})


def test_masks_that_fit_pass(masks):
    check_masks(masks, {"a.weight": (2, 3), "b.weight": (4, 5)})


def test_both_sides_are_listed_when_names_differ(masks):
    with pytest.raises(UserError, match=r"1 names \(b\.weight\) only in the masks.*1 names \(xb\.weight\) only in"):
        check_masks(masks, {"a.weight": (2, 3), "xb.weight": (4, 5)})


def test_a_shape_that_differs_is_named(masks):
    with pytest.raises(UserError, match=r"b\.weight: mask \(4, 5\), weight \(5, 4\)"):
        check_masks(masks, {"a.weight": (2, 3), "b.weight": (5, 4)})
