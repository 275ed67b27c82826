import subprocess
import sys

import pytest

import sparse_ft.pruning


@pytest.mark.parametrize("name", sparse_ft.pruning.__all__)
def test_the_precursors_names_are_there(name):
    assert callable(getattr(sparse_ft.pruning, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compute_magic_mask'"):
        _ = sparse_ft.pruning.compute_magic_mask


def test_asking_for_the_package_loads_nothing_heavy():
    code = "import sys, sparse_ft.pruning; sys.exit(any(m in sys.modules for m in ('torch', 'numba', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
