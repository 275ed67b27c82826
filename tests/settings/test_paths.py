"""Paths are one thing, however they are written, on the command line and in YAML, for every parameter that is one."""

from dataclasses import fields

import pytest
import yaml

from sparse_ft.cli import COMMANDS
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import SweepConfig, ValidateConfig
from sparse_ft.settings.field import is_optional
from sparse_ft.settings.parser import Parser
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import load_study

KINDS = [command.parameters for command in COMMANDS.values()]
REQUIRED = {"checkpoint": "c", "masks": "m", "config": "c", "run_id": "r"}
PATHS = {(kind, entry.name): entry for kind in KINDS for entry in fields(kind) if entry.metadata["path"] is not None}
PARAMETERS = list(PATHS)


def both_ways(kind, name, value, folder):
    """The parameter, given as a flag, as a flag with an equals sign, as a plain value and in a file."""
    rest = {key: text for key, text in REQUIRED.items() if key in {entry.name for entry in fields(kind)}}
    rest |= {name: value}
    parser = Parser(kind)
    read = [
        parser.arguments([part for key, text in rest.items() for part in (f"--{key}", text)]),
        parser.arguments([f"--{key}={text}" for key, text in rest.items()]),
        parser.values(rest, "a file"),
    ]
    if "config" not in rest:
        file = folder / "values.yaml"
        file.write_text(yaml.safe_dump(rest))
        read.append(parser.arguments(["--config", str(file)]))
    (one,) = {getattr(instance, name) for instance in read}
    return one


@pytest.mark.parametrize(("kind", "name"), PARAMETERS)
def test_every_parameter_that_is_a_path(kind, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    for written, meant in [
        ("~/x", "/home/somebody/x"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("${SCRATCH}/x//y/", "/scratch/me/x/y"),
        ("$HOME/../x", "/home/x"),
        ("/a/./b/../c", "/a/c"),
        ("../a/./b", "../a/b"),
        (f"{tmp_path}/", str(tmp_path)),
    ]:
        assert both_ways(kind, name, written, tmp_path) == meant, written
    with pytest.raises(UserError, match="the variable UNHEARD_OF is not set"):
        both_ways(kind, name, "$UNHEARD_OF/x", tmp_path)
    with pytest.raises(UserError, match="no user nobody-here"):
        both_ways(kind, name, "~nobody-here/x", tmp_path)
    with pytest.raises(UserError, match=f"{name} is empty"):
        both_ways(kind, name, "", tmp_path)


@pytest.mark.parametrize(("kind", "name"), PARAMETERS)
def test_words_stay_and_paths_of_their_names_stay_paths(kind, name, tmp_path):
    entry = PATHS[kind, name]
    for word in (*entry.metadata["path"], *(["none"] if is_optional(entry) else [])):
        assert both_ways(kind, name, word, tmp_path) == (None if word == "none" and is_optional(entry) else word)
        assert both_ways(kind, name, f"./{word}", tmp_path) == f"./{word}"
        assert both_ways(kind, name, f"./a/../{word}/", tmp_path) == f"./{word}"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CellConfig, "model", "owner/name"),
        (CellConfig, "model", "owner/name@main"),
        (CellConfig, "model", "./owner/name"),  # a folder, whatever the hub has
        (CellConfig, "teacher", "owner/name"),
        (CellConfig, "teacher", "./owner/name"),
        (CellConfig, "teacher", "runs:/0123"),
        (ValidateConfig, "checkpoint", "models:/tiny-llama-boolq-sparse@sparse70"),
        (ValidateConfig, "checkpoint", "models:/tiny-llama/1"),
        (ValidateConfig, "checkpoint", "runs:/0123/model"),
        (CellConfig, "task", "~/x"),
        (CellConfig, "register_as", "a//b"),
        (SweepConfig, "ray_address", "ray://host:10001"),
    ],
)
def test_what_is_no_path_is_left_alone(kind, name, value, tmp_path):
    assert both_ways(kind, name, value, tmp_path) == value


def test_a_folder_with_a_dollar_in_its_name_is_a_folder(tmp_path):
    (tmp_path / "a$b").mkdir()
    assert both_ways(CellConfig, "data_dir", f"{tmp_path}/a$b/", tmp_path) == f"{tmp_path}/a$b"


def test_two_spellings_in_a_study_are_one_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "data")
    path = tmp_path / "study.yaml"
    grid = {"data_dir": ["data", "./data", "data/", "$DATA", "x/../data"], "sparsity": [0.5]}
    path.write_text(yaml.safe_dump({"grid": grid, "cell": {"model": "$DATA/m"}, "dense_baseline": False}))
    (cell,) = make_plan(load_study(path)).cells
    assert (cell.config.data_dir, cell.config.model) == ("data", "data/m")
