from dataclasses import fields

import pytest

from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import AnalyzeConfig, MaskConfig, SweepConfig, ValidateConfig
from sparse_ft.settings.parser import Parser

KINDS = [MaskConfig, CellConfig, ValidateConfig, AnalyzeConfig, SweepConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_flag_and_a_help_text(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside names
    with pytest.raises(SystemExit) as stop:
        Parser(kind, "program").arguments(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for entry in fields(kind):
        assert (f" --{entry.name} " in shown) == entry.metadata["flag"]
        assert entry.metadata["help"], entry.name
        assert (entry.metadata["help"] in shown) == entry.metadata["flag"], entry.name


def test_flags_and_a_file_with_flags_on_top(tmp_path):
    path = tmp_path / "cell.yaml"
    path.write_text("max_steps: 7\nmode: dense\n")
    cell = Parser(CellConfig).arguments(["--config", str(path), "--max_steps", "9"])
    assert (cell.max_steps, cell.mode, cell.model) == (9, "dense", "smollm2-135m")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_steps", "many"], "max_steps is 'many'; it must be a whole number."),
        (["--mode", "thin"], "mode is 'thin'; it must be dense | sparse_to_dense | sparse_to_sparse | full | pruned."),
        (["--eval_limit", "all"], "eval_limit is 'all'; it must be a whole number or none."),
        (["--learning_rate", "fast"], "learning_rate is 'fast'; it must be a number."),
        (["--steps", "3"], "--steps"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_a_wrong_value_is_one_clear_line(argv, message):
    with pytest.raises(UserError) as raised:
        Parser(CellConfig).arguments(argv)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_counts_may_be_none():
    cell = Parser(CellConfig).arguments(["--eval_limit", "none", "--num_fewshot", "5", "--eval_batch_size", "auto"])
    assert (cell.eval_limit, cell.num_fewshot, cell.eval_batch_size) == (None, 5, "auto")


@pytest.mark.parametrize("levels", ["0:0.9:0.3", "0.9,0,0.3,0.6", [0, 0.3, 0.6, 0.9], (0.9, 0.6, 0.3, 0.0, 0.3)])
def test_levels_are_numbers_however_they_are_written(levels, tmp_path):
    assert Parser(MaskConfig).values({"sparsities": levels}, "a study").sparsities == (0.0, 0.3, 0.6, 0.9)
    path = tmp_path / "masks.yaml"
    path.write_text(f"sparsities: {levels if isinstance(levels, str) else list(levels)}\n")
    assert Parser(MaskConfig).arguments(["--config", str(path)]).sparsities == (0.0, 0.3, 0.6, 0.9)


def test_one_level_may_be_a_number():
    assert Parser(MaskConfig).values({"sparsities": 0.5}, "a study").sparsities == (0.5,)
    assert Parser(MaskConfig).arguments(["--sparsities", "0:0.9:0.9"]).sparsities == (0.0, 0.9)


def test_what_cannot_be_read_is_said_with_all_else_that_is_wrong():
    with pytest.raises(UserError, match=r"sparsities is '7'; every level.*seed is -1"):
        Parser(MaskConfig).arguments(["--sparsities", "7", "--seed", "-1"])


def test_none_may_be_empty_in_a_file_where_none_is_a_value():
    assert Parser(CellConfig).values({"eval_limit": None, "masks": None}, "a study").eval_limit is None
    with pytest.raises(UserError, match="target_modules is empty"):
        Parser(CellConfig).values({"target_modules": None}, "a study")


def test_plain_values_are_checked_too():
    assert Parser(CellConfig).values({"max_steps": 3}, "study x").max_steps == 3
    with pytest.raises(UserError, match="study x: there is no field 'stepz'"):
        Parser(CellConfig).values({"stepz": 3}, "study x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(range(256)), "not valid YAML"),
        (b"max_steps: null", "max_steps is empty"),
        (b"max_steps: [1]", "it must be a plain value"),
        (b"max_steps: 7\nmax_steps: 8", "twice"),
        (b"max_stepz: 7", "no field 'max_stepz'"),
        (b"hello", "no table"),
        (b"[" * 50_000, "nested too deeply"),
        (b"max_steps: '" + b"[" * 50_000 + b"'", "long or nested"),
        (b"max_steps: '" + b"- " * 2_000 + b"'", "long or nested"),
        (b"x" * (2 << 20), "larger than"),
        (f"max_steps: {10**400}".encode(), "more than a machine's integers hold"),
        (b"learning_rate: .nan", "finite"),
    ],
)
def test_a_file_that_holds_no_parameters_is_one_clear_line(content, message, tmp_path):
    path = tmp_path / "cell.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        Parser(CellConfig).arguments(["--config", str(path)])
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_steps", str(10**400)], "more than a machine's integers hold"),
        (["--max_steps", "1" * 5000], "long or nested"),
        (["--seed", "[" * 4000], "long or nested"),
        (["--learning_rate", "1e999"], "finite"),
        (["--sparsity", ".nan"], "finite"),
        (["--output_dir", "a\0b"], "NUL"),
        (["--config", "a\0b"], "NUL"),
        (["--config"], "config is empty"),
    ],
)
def test_values_that_no_parameter_takes_are_one_clear_line(argv, message):
    with pytest.raises(UserError) as raised:
        Parser(CellConfig).arguments(argv)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_file_may_hold_what_has_no_default(tmp_path):
    path = tmp_path / "validate.yaml"
    path.write_text("checkpoint: a\nmasks: b\ntolerance: 1e-3\n")
    config = Parser(ValidateConfig).arguments(["--config", str(path), "--masks", "c"])
    assert config == ValidateConfig("a", "c", 1e-3)
    with pytest.raises(UserError, match="masks"):
        Parser(ValidateConfig).arguments(["--checkpoint", "a"])
