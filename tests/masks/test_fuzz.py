"""10,000 damaged files, mask files and studies: a line or the right masks, nothing else, in bounded memory and time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ft.settings.commands import FORMATS

PROGRAM = Path(__file__).parents[1] / "support" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [*((kind, 3000) for kind in FORMATS), ("yaml", 1000)])
def test_a_damaged_file_is_one_line_or_the_right_masks(kind, count, tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), kind, str(count), "0", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=PROGRAM.parents[2],
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ended = json.loads(done.stdout)
    assert sum(ended.values()) == count
    assert min(ended.values()) > 50, "damage that is never, or always, refused tests nothing"
