"""Settings as a command, read back."""

import shlex
from dataclasses import replace

import pytest

from sparse_ft.settings.cell import CellConfig, TrainConfig, mask_set_of
from sparse_ft.settings.command_line import command_line
from sparse_ft.settings.commands import MaskConfig, SweepConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.settings.parser import Parser


def read_back(command, kind):
    program, _, *words = shlex.split(command)
    assert program == "sparse-ft"
    return Parser(kind).arguments(words)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": 1 / 3, "mode": "sparse_to_dense", "seed": 7, "data_dir": "made", "score_untuned": False},
        {"importance": "wanda", "scope": "row", "update": "refit", "calibration_corpus": "wikitext2"},
        {"mode": "dense", "learning_rate": 3e-5, "eval_limit": None, "perplexity_tokens": 0, "model": "a b/c'd"},
        {"recover_steps": 3, "teacher": "dense", "keep": "all", "register_as": "auto"},
    ],
)
def test_a_cells_command_is_the_cell(changes):
    cell = CellConfig(**changes)
    again = read_back(command_line("train", cell), TrainConfig)
    assert again.canonical() == cell.canonical() and again.key() == cell.key()
    assert plain_values(again).items() >= plain_values(cell).items()


def test_a_study_and_its_mask_sets_have_commands_too():
    kind = replace(mask_set_of(CellConfig(importance="taylor")), sparsities=(0.25, 0.5))
    again = read_back(command_line("compute_masks", kind), MaskConfig)
    assert (again.sparsities, again.importance, again.task) == ((0.25, 0.5), "taylor", "boolq")
    study = SweepConfig(config="configs/smoke.yaml", max_workers=2, resume="abc")
    assert read_back(command_line("sweep", study, ("resume",)), SweepConfig).resume is None


def test_paths_are_those_of_every_folder_and_a_function_has_no_command(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    assert f"--data_dir={tmp_path}/rows" in command_line("train", CellConfig(data_dir="rows", model="who/knows"))
    assert command_line("compute_masks", MaskConfig(importance=lambda weight, statistics: weight)) is None
