"""What is imported when: by whole commands in fresh processes, and by the modules of a folder."""

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys

import grimp
import pytest

from sparse_ft.cli import COMMANDS
from sparse_ft.masks.files import save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep

HEAVY = ("torch", "transformers", "peft", "lm_eval", "datasets", "mlflow", "pandas", "matplotlib", "numba")
COUNTED = f"import json, sys\n%s\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def loaded(work):
    """Which of `HEAVY` a fresh interpreter has loaded after ``work``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COUNTED % work], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])), done.stderr


def after_command(status, name, *words, **flags):
    """Which of `HEAVY` a command has loaded when it ends, which it does with ``status``."""
    argv = [*words, *(f"--{flag}={value}" for flag, value in flags.items())]
    return loaded(
        f"from sparse_ft.cli import run\ntry:\n    status = run({name!r}, {argv!r}, 'test')\n"
        f"except SystemExit as end:\n    status = end.code\nassert status == {status}, status"
    )


@pytest.fixture
def model(tiny_model):
    folder = tiny_model("tiny-llama")
    Checkpoint(folder).check()  # the cache has what transformers says of it, as it has of every model once used
    return folder


@pytest.mark.parametrize(
    ("name", "words", "flags", "said"),
    [
        ("validate", (), {"checkpoint": "nowhere", "masks": "gone.safetensors"}, "does not exist"),
        ("compute_masks", (), {"model": "./nowhere"}, "neither a folder"),
        ("compute_masks", (), {"sparsities": "2"}, "between 0 and 1"),
        ("sweep", (), {"config": "gone.yaml"}, "does not exist"),
        ("train", ("--max_steps", "many"), {}, "max_steps"),
        ("train", (), {"model": "./nowhere"}, "neither a folder"),
    ],
)
def test_wrong_input_is_answered_before_anything_heavy_is_loaded(name, words, flags, said):
    found, errors = after_command(2, name, *words, **flags)
    assert said in errors
    assert found <= {"numba"}


def test_help_loads_nothing_heavy():
    helps = "\n".join(
        f"try:\n    run({name!r}, ['--help'], 'test')\nexcept SystemExit as end:\n    assert end.code == 0"
        for name in COMMANDS
    )
    assert loaded(f"from sparse_ft.cli import run\n{helps}")[0] == set()


@pytest.mark.parametrize("method", ["structured", "random"])
def test_masks_by_weight_alone_need_no_torch(model, tmp_path, method):
    found, _ = after_command(0, "compute_masks", model=model, method=method, output_dir=tmp_path / "masks")
    assert found == {"mlflow", "pandas", "matplotlib", "numba"}


def test_validating_needs_no_torch(model, tmp_path):
    masks = save_masks(MaskSet.all_kept(Checkpoint(model).prunable_shapes()), tmp_path / "masks.npz")
    assert after_command(0, "validate", checkpoint=model, masks=masks)[0] == {"mlflow", "pandas"}


def test_a_dry_run_needs_nothing_that_trains_or_scores(model, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(
        f"grid: {{model: [{model}], sparsity: [0.5], importance: [magnitude, wanda]}}\n"
        "cell: {data_dir: made, device: cpu, dtype: float32, calibration_samples: 2, calibration_seq_len: 32}\n"
    )
    config = SweepConfig(config=str(study), dry_run=True)
    assert sweep(config) == 0  # tokenizer, task and rows have been read once
    assert after_command(0, "sweep", config=study, dry_run=True)[0] == {"mlflow", "pandas", "numba"}


def modules(*folders):
    """The modules of packages, or modules by their own name."""
    for name in folders:
        yield name
        if folder := importlib.util.find_spec(name).submodule_search_locations:
            yield from (found.name for found in pkgutil.walk_packages(folder, f"{name}."))


@pytest.mark.parametrize(
    ("folders", "allowed"),
    [
        (
            [
                f"sparse_ft.{name}"
                for name in ("settings", "errors", "levels", "files", "progress", "lazy", "cache", "cli")
            ],
            set(),
        ),
        (["sparse_ft.masks"], {"matplotlib"}),
        (["sparse_ft.analysis"], {"pandas", "matplotlib"}),
        (["sparse_ft.tracking"], {"mlflow", "pandas"}),
        (["sparse_ft.validation", "sparse_ft.models.opening", "sparse_ft.models.catalog"], set()),
        (["sparse_ft.study.driver", "sparse_ft.study.worker"], {"mlflow", "pandas", "numba"}),
        (["sparse_ft.pruning.generator", "sparse_ft.cell.masks", "sparse_ft.cell.record"], {"numba"}),
    ],
)
def test_a_folder_loads_only_what_it_may(folders, allowed):
    found, _ = loaded("\n".join(f"import {name}" for name in modules(*folders)))
    assert found <= allowed


def test_what_modelzoo_runs_loads_neither_transformers_nor_peft():
    """Its own modules need ModelZoo; what they import of this package is imported here, with both out of reach."""
    graph = grimp.build_graph("sparse_ft", exclude_type_checking_imports=True)
    folder = "sparse_ft.cerebras.modelzoo"
    inside = {folder} | graph.find_descendants(folder)
    imported = {name for module in inside for name in graph.find_modules_directly_imported_by(module)} - inside
    assert imported
    work = "sys.modules.update(dict.fromkeys(('transformers', 'peft')))\n"
    assert loaded(work + "\n".join(f"import {name}" for name in sorted(imported)))
