"""The command `sparse-ft`: its table, its help, and that it works where the package was installed and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import is_dataclass
from pathlib import Path
from pkgutil import resolve_name

import pytest

from sparse_ft import __version__
from sparse_ft.cli import COMMANDS, main
from sparse_ft.models.catalog import locate_config

ROOT = Path(__file__).resolve().parents[1]
QUICK = "import sys; sys.argv = ['sparse-ft', *{argv}]; from sparse_ft.cli import main; main(); print(*sys.modules)"

# Several commands in a process that lacks some modules: each one's status, and what it complained of.
WITHOUT = """
import io, json, sys
from contextlib import redirect_stderr
*absent, asked = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
from sparse_ft.cli import run
for name, *argv in json.loads(asked):
    with redirect_stderr(io.StringIO()) as said:
        try:
            status = run(name, argv, name)
        except SystemExit as stop:
            status = stop.code
    print("ENDED", json.dumps([status, said.getvalue()]))
"""


@pytest.fixture
def sparse_ft(monkeypatch, capsys):
    """Runs `sparse-ft WORDS`; returns (exit status, stdout, stderr). --help of a command ends the process with 0."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sparse-ft", *words])
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_row_of_the_table_is_a_command_and_an_entry_point(name):
    command = COMMANDS[name]
    assert is_dataclass(command.parameters) and callable(resolve_name(command.work))
    assert command.summary.endswith(".") and len(command.summary) < 120
    text = (ROOT / "entrypoints" / f"{name}.py").read_text(encoding="utf-8")
    assert f'run("{name}", sys.argv[1:], "python -m entrypoints.{name}")' in text


def test_every_entry_point_is_a_row_of_the_table():
    assert {path.stem for path in (ROOT / "entrypoints").glob("*.py")} == {"__init__", *COMMANDS}


def test_help_lists_every_command(sparse_ft):
    for words in ((), ("--help",), ("-h",)):
        status, shown, _ = sparse_ft(*words)
        assert status == 0
        lines = [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  ")]
        assert lines == [[name, command.summary] for name, command in COMMANDS.items()]


@pytest.mark.parametrize("name", ["cerebras_configs", "cerebras-configs"])
def test_a_commands_own_help(sparse_ft, name):
    status, shown, _ = sparse_ft(name, "--help")
    assert status == 0 and shown.startswith("usage: sparse-ft cerebras_configs ") and "--output_dir" in shown


def test_wrong_words_are_one_line_and_status_2(sparse_ft):
    for words, message in (
        (("prune",), "sparse-ft: there is no command 'prune'; there are compute_masks, "),
        (("validate", "--checkpoint", "X"), "validate: "),
        (("train", "--no_such_flag", "1"), "train: "),
    ):
        status, shown, complaint = sparse_ft(*words)
        assert (status, shown, complaint.count("\n")) == (2, "", 1) and complaint.startswith(message)


def test_a_command_does_its_work_and_returns_its_status(sparse_ft, tmp_path):
    status, shown, _ = sparse_ft("compute-masks", "--model", "tiny-llama", "--output-dir", str(tmp_path / "masks"))
    assert status == 0 and "weights pruned" in shown
    assert (tmp_path / "masks" / "masks_sparsity50_unstructured.safetensors").is_file()


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(argv):
    done = subprocess.run([sys.executable, "-c", QUICK.format(argv=argv)], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy", "mlflow", "transformers"} & set(done.stdout.split())


@pytest.mark.slow
def test_without_the_extras_commands_work_that_do_not_need_them(tmp_path):
    """As after `pip install sparse_ft`: no h5py, no Ray, no driver of PostgreSQL, no boto3, no test tools."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    absent = [
        re.match(r"[a-z0-9]+", line)[0] for name in ("cerebras", "ray", "postgresql", "s3") for line in extras[name]
    ]
    assert {"h5py", "hdf5plugin", "ray", "psycopg", "boto3"} == set(absent)
    study = str(ROOT / "configs" / "smoke.yaml")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "x.mdl").write_bytes(b"")
    shutil.copy(locate_config("tiny-llama"), tmp_path)
    asked = [
        ("sweep", "--config", study, "--dry_run"),
        ("compute_masks", "--model", "x.mdl"),
        ("sweep", "--config", study, "--executor", "ray"),
    ]
    words = [sys.executable, "-c", WITHOUT, *absent, json.dumps([(*argv, "--output_dir", "out") for argv in asked])]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    dry, cerebras, ray = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    assert dry[0] == 0
    assert cerebras[0] == 2 and cerebras[1].endswith("pip install 'sparse_ft[cerebras]'\n"), cerebras
    assert ray[0] == 2 and ray[1].endswith("pip install 'sparse_ft[ray]'.\n"), ray


@pytest.mark.slow
def test_an_install_into_an_empty_environment_gives_the_command(tmp_path):
    """`pip install .` of the sources alone; what they need comes from the environment of this test."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("sparse_ft", "entrypoints"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(tmp_path / "venv", symlinks=True)
    binaries = tmp_path / "venv" / "bin"
    environment = {**os.environ, "PYTHONPATH": ""}

    def run(*words):
        words = [str(word) for word in words]
        return subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    installed = Path(run(binaries / "python", "-c", ask).strip())
    (installed / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # its packages, not its own .pth files
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python")
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--no-index", source)
    assert run(binaries / "sparse-ft", "--version") == f"sparse_ft {__version__}\n"
    assert all(f"  {name} " in run(binaries / "sparse-ft", "--help") for name in COMMANDS)
    made = run(binaries / "sparse-ft", "compute_masks", "--model", "tiny-llama", "--output_dir", tmp_path / "masks")
    assert "weights pruned" in made
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():  # what is no Python came along
        folder = Path(*package.split("."))
        for path in (path for pattern in patterns for path in (ROOT / folder).glob(pattern)):
            assert (installed / path.relative_to(ROOT)).is_file()
    assert not (installed / "entrypoints").exists()
