"""MLproject, conda.yaml, pyproject.toml, the Makefile, the locks and the typed parameters say the same."""

import os
import re
import subprocess
import tomllib
from dataclasses import MISSING, fields
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from sparse_ft import __version__
from sparse_ft.cli import COMMANDS
from sparse_ft.settings.field import plain

ROOT = Path(__file__).resolve().parents[1]
STEPS = {name: command.parameters for name, command in COMMANDS.items() if name != "cerebras_configs"}


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _needed(lines):
    """Canonical names of what is installed for requirements, theirs included, by what is installed here."""
    seen, todo = set(), [Requirement(line) for line in lines]
    while todo:
        wanted = todo.pop()
        for extra in ("", *wanted.extras):
            if (key := (_canonical(wanted.name), extra)) not in seen:
                seen.add(key)
                more = map(Requirement, requires(wanted.name) or [])
                todo += [found for found in more if not found.marker or found.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def _requirements(lines):
    """Canonical name -> version, of lines such as ``torch==2.13.0``."""
    pairs = (re.match(r"([A-Za-z0-9_.-]+)\s*(?:==\s*(\S+))?", line) for line in lines)
    return {_canonical(match[1]): match[2] for match in pairs if match}


def _locked(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return _requirements(line for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def lock():
    """What `make test` installs."""
    return _locked("lock.txt")


@pytest.fixture(scope="module")
def base():
    """What `make demo` installs."""
    return _locked("base.txt")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def mlproject():
    return yaml.safe_load((ROOT / "MLproject").read_text())


def test_the_tests_lock_pins_everything_and_holds_every_extra_but_that_of_the_site(lock, project):
    assert all(lock.values())
    extras = project["optional-dependencies"]
    assert set(extras) == {"cerebras", "ray", "submitit", "postgresql", "s3", "test", "docs"}
    wanted = [line for name, extra in extras.items() if name != "docs" for line in extra] + project["dependencies"]
    assert {Requirement(line).name for line in extras["test"]} >= {"sparse_ft", "pytest"}
    assert {_canonical(Requirement(line).name) for line in wanted} - {"sparse-ft"} <= set(lock)
    assert Requirement(extras["test"][0]).extras == set(extras) - {"test", "docs"}


def test_the_demos_lock_holds_what_the_program_needs_and_no_more(lock, base, project):
    needed = _needed(project["dependencies"]) - {"triton"}  # which torch's builds for GPUs bring along themselves
    assert base == {name: version for name, version in lock.items() if name in needed}
    assert not {"ray", "submitit", "pytest", "ruff", "moto", "boto3", "psycopg", "h5py", "hdf5plugin"} & set(base)


@pytest.mark.parametrize("name", ["base.txt", "lock.txt"])
def test_a_lock_installs_nothing_from_elsewhere(name):
    text = (ROOT / "requirements" / name).read_text()
    assert not re.search(r"@|://|\+cpu|nvidia(?!-ml-py)|^-", text, re.MULTILINE)


def _made(*words):
    """The commands that make would run in a fresh clone, also where make runs these tests."""
    wanted = ["make", "--dry-run", "--always-make", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(wanted, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_make_installs_for_the_demo_what_it_needs_and_adds_to_it_for_the_tests():
    """Torch first and pinned; whichever of the two comes first, the other finds its packages."""
    demo, test = (_made(target) for target in ("demo", "test"))
    installs = [line.split("--quiet ")[1] for line in test if " pip install " in line]
    assert installs == [
        "\"$(grep '^torch==' requirements/base.txt)\" $(.venv/bin/python -m requirements.torch_index)",
        "--requirement requirements/base.txt",
        "--no-deps --editable .",
        "--requirement requirements/lock.txt",
    ]
    assert demo[:-1] == test[: len(demo) - 1] and demo[-2] == "touch .venv/.ready"
    assert [line for line in test if line.startswith("touch")] == ["touch .venv/.ready", "touch .venv/.ready-tests"]


def test_make_takes_the_interpreter_that_it_is_told_to_in_an_environment_of_its_own():
    first, *_, last = _made("test", "PYTHON=python3.12")
    assert first == "test -x .venv-python3.12/bin/python || python3.12 -m venv .venv-python3.12"
    assert last.startswith(".venv-python3.12/bin/python -m pytest")
    (made,) = [line for line in _made("demo") if " -m venv " in line]
    assert re.search(r"\|\| python3\.1[123] -m venv \.venv$", made)


def test_conda_lists_the_projects_dependencies_in_the_locks_versions(base, project):
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert "python=3.11" in conda
    assert pip[-1] == "-e ."
    pinned = _requirements(pip[:-1])
    assert pinned == {name: base[name] for name in pinned}
    assert set(pinned) == {_canonical(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}
    assert pip[0].startswith("torch==")


def test_known_good_versions_are_the_ones_locked(lock):
    known = {"torch": "2.13.0", "mlflow": "3.17.2", "transformers": "5.23.0", "peft": "0.21.2", "lm-eval": "0.4.13"}
    assert {name: lock[name] for name in known} == known


def test_the_version_is_one(project):
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_entry_point_is_there(mlproject):
    assert set(mlproject["entry_points"]) == {"main", *STEPS}
    assert mlproject["conda_env"] == "conda.yaml"
    assert mlproject["entry_points"]["main"]["parameters"]["config"]["default"] == "configs/demo.yaml"


@pytest.mark.parametrize("step", STEPS)
def test_parameters_and_defaults_are_those_of_the_command(mlproject, step):
    entry = mlproject["entry_points"][step]
    known = {field.name: field for field in fields(STEPS[step])}
    for name, declared in entry["parameters"].items():
        default = known[name].default
        assert declared.get("default") == (None if default is MISSING else str(plain(known[name], default))), name
    flags = re.findall(r"--(\w+) \{(\w+)\}", entry["command"])
    assert all(flag == value for flag, value in flags)
    assert [flag for flag, _ in flags] == list(entry["parameters"])
    assert entry["command"].startswith(f"python -m entrypoints.{step} ")
