import sys

import pytest
import torch

from sparse_ft.memory import peak_bytes, reset_peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process reset its peak")
def test_the_peak_is_that_of_the_work_since_the_reset():
    size = 200_000_000
    block = torch.ones(size, dtype=torch.uint8)
    with_block = peak_bytes()
    del block
    reset_peak()
    without = peak_bytes()
    assert without <= with_block - size * 0.9
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_bytes() >= without + size * 0.9
    del block
