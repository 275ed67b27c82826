import subprocess
import sys

import pytest

from sparse_ft.memory import reset_peak

# In a process of its own: what other tests left in this one's heap, or do in its threads, moves its peak too.
PROGRAM = """
import torch
from sparse_ft.memory import peak_bytes, reset_peak

size = 200_000_000
block = torch.ones(size, dtype=torch.uint8)
with_block = peak_bytes()
del block
assert reset_peak()
without = peak_bytes()
assert without <= with_block - size * 0.9, (without, with_block)
block = torch.ones(size, dtype=torch.uint8)
assert peak_bytes() >= without + size * 0.9, (without, peak_bytes())
"""


def test_the_peak_is_that_of_the_work_since_the_reset():
    if not reset_peak():
        pytest.skip("this system lets no process reset its peak")
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
