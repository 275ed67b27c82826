import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.pruning import Calibration


@pytest.mark.parametrize(
    "ids", [torch.ones(2, 5), torch.ones(5, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)]
)
def test_calibration_ids_are_checked(ids):
    with pytest.raises(UserError, match="Calibration data must be"):
        Calibration(ids).check()
