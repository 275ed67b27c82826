"""The public names of every package: each is there, loads nothing before it is used, and hides no module."""

import pkgutil
import re
import subprocess
import sys
from importlib import import_module

import pytest
from documents import PAGES, text

import sparse_ft

FOLDERS = [name for _, name, is_folder in pkgutil.walk_packages(sparse_ft.__path__, "sparse_ft.") if is_folder]
PACKAGES = ["sparse_ft", *(name for name in FOLDERS if hasattr(import_module(name), "__getattr__"))]
HEAVY = ("torch", "numba", "numpy", "pandas", "transformers", "peft", "lm_eval", "mlflow", "matplotlib", "optuna")


def test_the_packages_that_offer_names():
    assert {"sparse_ft", "sparse_ft.evaluation", "sparse_ft.lora", "sparse_ft.pruning"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there_and_is_no_modules(package):
    module = import_module(package)
    inside = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert module.__all__ == dir(module) == sorted(module.__all__) and not inside & set(module.__all__)
    assert all(callable(getattr(module, name)) for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'compute_magic_mask'"):
        _ = module.compute_magic_mask


def test_importing_the_packages_loads_nothing_heavy():
    code = f"import sys, {', '.join(PACKAGES)}; sys.exit(' '.join(set({HEAVY}) & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_pages_import_public_names_from_the_top():
    imports = [
        names for page in PAGES for names in re.findall(r"^from sparse_ft import (.*)$", text(page), re.MULTILINE)
    ]
    used = {name.strip() for names in imports for name in names.split(",")}
    assert {"LoraSettings", "MaskGenerator"} <= used <= set(sparse_ft.__all__)
