"""MLproject, conda.yaml, pyproject.toml, the lock and the typed parameters say the same."""

import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from sparse_ft.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
STEPS = {name: command.parameters for name, command in COMMANDS.items() if name != "cerebras_configs"}


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(lines):
    """Canonical name -> version, of lines such as ``torch==2.13.0``."""
    pairs = (re.match(r"([A-Za-z0-9_.-]+)\s*(?:==\s*(\S+))?", line) for line in lines)
    return {_canonical(match[1]): match[2] for match in pairs if match}


@pytest.fixture(scope="module")
def lock():
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    return _requirements(line for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def mlproject():
    return yaml.safe_load((ROOT / "MLproject").read_text())


def test_the_lock_pins_everything_and_holds_every_dependency(lock, project):
    assert all(lock.values())
    wanted = project["dependencies"] + [name for extra in ("test",) for name in project["optional-dependencies"][extra]]
    assert {_canonical(re.match(r"[\w.-]+", line)[0]) for line in wanted} <= set(lock)


def test_the_lock_installs_nothing_from_elsewhere():
    text = (ROOT / "requirements" / "lock.txt").read_text()
    assert not re.search(r"@|://|\+cpu|nvidia|^-", text, re.MULTILINE)


def test_conda_lists_the_projects_dependencies_in_the_locks_versions(lock, project):
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert "python=3.11" in conda
    assert pip[-1] == "-e ."
    pinned = _requirements(pip[:-1])
    assert pinned == {name: lock[name] for name in pinned}
    assert set(pinned) == {_canonical(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}
    assert pip[0].startswith("torch==")


def test_known_good_versions_are_the_ones_locked(lock):
    known = {"torch": "2.13.0", "mlflow": "3.17.2", "transformers": "5.23.0", "peft": "0.21.2", "lm-eval": "0.4.13"}
    assert {name: lock[name] for name in known} == known


def test_every_entry_point_is_there(mlproject):
    assert set(mlproject["entry_points"]) == {"main", *STEPS}
    assert mlproject["conda_env"] == "conda.yaml"
    assert mlproject["entry_points"]["main"]["parameters"]["config"]["default"] == "configs/demo.yaml"


@pytest.mark.parametrize("step", STEPS)
def test_parameters_and_defaults_are_those_of_the_command(mlproject, step):
    entry = mlproject["entry_points"][step]
    defaults = {field.name: field.default for field in fields(STEPS[step])}
    for name, declared in entry["parameters"].items():
        default = defaults[name]
        assert declared.get("default") == (None if default is MISSING else str(default)), name
    flags = re.findall(r"--(\w+) \{(\w+)\}", entry["command"])
    assert all(flag == value for flag, value in flags)
    assert [flag for flag, _ in flags] == list(entry["parameters"])
    assert entry["command"].startswith(f"python -m entrypoints.{step} ")
