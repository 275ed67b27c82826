"""A study's YAML that is not what it should be: one line, at once, and no folder of another name."""

import pytest
import yaml
from documents import ROOT

from sparse_ft.errors import UserError
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import load_study


@pytest.fixture
def plan_of(tmp_path):
    """Writes a study's text (or bytes) and plans it."""

    def plan(content):
        path = tmp_path / "study.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return make_plan(load_study(path))

    return plan


def study(**changes):
    return yaml.safe_dump({"name": "one", "grid": {"sparsity": [0.5, 0.6]}, "cell": {"model": "tiny-llama"}} | changes)


@pytest.mark.parametrize("name", ["2024", "2024.5", "café", "a b", "_one", "grid (second)", "a" * 100, "v1.2"])
def test_names_that_a_folder_can_have(plan_of, name):
    assert plan_of(f"name: {name}\ngrid: {{sparsity: [0.5]}}").study.name == name


def test_a_study_without_a_name_has_its_file_s(plan_of):
    assert plan_of("grid: {sparsity: [0.5]}").study.name == "study"


@pytest.mark.parametrize(
    "name",
    [
        "null", "~", "true", "[a]", "[]", "{a: b}", "!!binary aGk=", "''", "' '", "' a'", "'a '", ".",
        "..", "../..", "/tmp/x", "a/b", ".x", "-x", '"a\\nb"', '"a\\0b"', '"\\x7f"', '"\\u2028"', '"a\\u202eb"',
        "a" * 101, "é" * 100 + "é", "'a\tb'", '"\\ud800"', "🙂" * 100, "漢" * 100,
    ],
)  # fmt: skip
def test_names_that_no_folder_can_have_are_one_line(plan_of, name):
    with pytest.raises(UserError) as raised:
        plan_of(f"name: {name}\ngrid: {{sparsity: [0.5]}}")
    assert "study.yaml" in str(raised.value)
    assert len(str(raised.value)) < 500


def bomb(levels=30):
    lines = ["a0: &a0 [0.5, 0.5]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "\n".join([*lines, f"grid: {{sparsity: *a{levels - 1}}}"])


GRID = "grid: {sparsity: [0.5]}\n"
CONTENTS = {
    "empty": ("", "no 'grid:'"),
    "a list": ("[1, 2]", "no 'grid:'"),
    "text": ("hello", "no 'grid:'"),
    "a list as grid": ("grid: [0.5]", "grid is no table of fields"),
    "an empty grid": ("grid: {}", "no 'grid:'"),
    "an empty axis": ("grid: {sparsity: []}", "is empty"),
    "an axis in a list": ("grid: {sparsity: [[0.5, 0.6]]}", "sparsity"),
    "an axis of tables": ("grid: {sparsity: [{a: 1}]}", "sparsity"),
    "an axis that is a table": ("grid: {sparsity: {a: 1}}", "sparsity"),
    "an axis with nothing in it": ("grid: {sparsity: [null]}", "sparsity"),
    "a date on an axis": ("grid: {task: [!!timestamp 2024-01-01]}", "task"),
    "bytes on an axis": ("grid: {task: [!!binary aGk=]}", "task"),
    "a set on an axis": ("grid: {task: !!set {a, b}}", "task"),
    "an unknown axis": ("grid: {sparsities: [0.5]}", "sparsities"),
    "a number as axis": ("grid: {1: [0.5]}", "no field's name"),
    "null as axis": ("grid: {null: [0.5]}", "no field's name"),
    "a tuple as axis": ("grid: {[1, 2]: [0.5]}", "study.yaml"),
    "NaN as sparsity": ("grid: {sparsity: [.nan]}", "sparsity"),
    "sparsity -1": ("grid: {sparsity: [-1]}", "sparsity"),
    "a huge number": (f"grid: {{seed: [{10**400}]}}", "seed is 1000"),
    "a number too long to read": (f"grid: {{seed: [{'1' * 5000}]}}", "study.yaml"),
    "a level that is no number": ("grid: {sparsity: '0:1:0'}", "0:1:0"),
    "a thousand million levels": ("grid: {sparsity: '0:1:0.000000001'}", "sparsit"),
    "a cell that is a list": (GRID + "cell: [max_steps]", "cell is no table"),
    "a cell that is a number": (GRID + "cell: 3", "cell is no table"),
    "a cell that is text": (GRID + "cell: max_steps", "cell is no table"),
    "a table in a cell": (GRID + "cell: {max_steps: {a: 1}}", "max_steps"),
    "null in a cell": (GRID + "cell: {max_steps: null}", "max_steps is empty"),
    "a date in a cell": (GRID + "cell: {task: !!timestamp 2024-01-01}", "task"),
    "a number as a field": (GRID + "cell: {3: 3}", "no field's name"),
    "an unknown key": (GRID + "cells: {}", "unknown key 'cells'"),
    "a number as a key": (GRID + "3: {}", "unknown key '3'"),
    "null as a key": (GRID + "null: {}", "unknown key 'None'"),
    "a list as keep": (GRID + "keep: [all]", "keep"),
    "a table as keep": (GRID + "keep: {a: b}", "keep"),
    "null as keep": (GRID + "keep: null", "keep"),
    "text as a switch": (GRID + "register: 'yes'", "register"),
    "a search that is a list": ("search: [1]", "search is no table"),
    "a search that is text": ("search: model", "search is no table"),
    "a key twice": ("grid: {sparsity: [0.5]}\ngrid: {sparsity: [0.6]}", "twice"),
    "an axis twice": ("grid: {sparsity: [0.5], sparsity: [0.6]}", "twice"),
    "a field twice": (GRID + "cell: {seed: 1, 'seed': 2}", "twice"),
    "a value in itself": ("grid: &g {sparsity: [0.5], seed: *g}", "contains itself"),
    "a list in itself": ("grid: {sparsity: &g [*g]}", "contains itself"),
    "an alias bomb": (bomb(), "more than"),
    "a merge bomb": ("a: &a {x: 1}\n" + "<<: [" + "*a, " * 90_000 + "]\n" + GRID, "study.yaml"),
    "nested deeply": ("grid: " + "[" * 50_000, "nested"),
    "nested deeply in blocks": ("- " * 20_000, "study.yaml"),
    "a thousand million cells": (
        yaml.safe_dump({"grid": {axis: list(range(1, 1001)) for axis in ("seed", "max_steps", "batch_size")}}),
        "1,000,000,000 cells",
    ),
    "two documents": (GRID + "---\n" + GRID, "study.yaml"),
    "code": ("!!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
    "an unknown tag": ("grid: !grid {sparsity: [0.5]}", "not valid YAML"),
    "an unknown alias": ("grid: *a", "not valid YAML"),
    "a bad timestamp": ("grid: {task: [!!timestamp 2024-99-99]}", "study.yaml"),
    "a bad int": ("grid: {seed: [!!int x]}", "study.yaml"),
    "a bad float": ("grid: {sparsity: [!!float x]}", "study.yaml"),
    "bad base64": ("grid: {task: [!!binary é]}", "study.yaml"),
    "a tab": ("grid:\n\tsparsity: [0.5]", "not valid YAML"),
    "latin-1": ("name: café\ngrid: {sparsity: [0.5]}".encode("latin-1"), "not valid YAML"),
    "UTF-16": ("grid: {sparsity: [0.5]}".encode("utf-16"), "not valid YAML"),
    "binary": (bytes(range(256)) * 8, "not valid YAML"),
    "zeros": (bytes(1000), "not valid YAML"),
    "2 MB": (b"#" * (2 << 20), "larger than"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_a_study_that_is_none_is_one_line(plan_of, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = CONTENTS[case]
    with pytest.raises(UserError) as raised:
        plan_of(content)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", "mlflow.db"}


def test_a_folder_and_a_missing_file_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_study(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_study(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="cannot be read"):
        load_study("a\0b")


def test_what_yaml_offers_still_works(plan_of):
    """A byte-order mark, aliases, merged tables, an axis of one value, a switch on an axis, a range of levels."""
    plan = plan_of(
        b"\xef\xbb\xbf"
        + b"name: one\n"
        + b"grid: {sparsity: '0.2:0.6:0.2', score_untuned: [true, false], seed: 3, eval_limit: [none, 4]}\n"
        + b"cell: {<<: &a {max_steps: 7, lora_r: 4}, lora_r: 2}\n"
        + b"dense_baseline: false\n"
    )
    assert len(plan.cells) == 3 * 2 * 2
    assert {(cell.seed, cell.max_steps, cell.lora_r) for cell in plan.configs} == {(3, 7, 2)}
    assert {cell.sparsity for cell in plan.configs} == {0.2, 0.4, 0.6}


def test_a_right_study_is_planned(plan_of):
    assert {cell.sparsity for cell in plan_of(study()).configs} == {0.5, 0.6}


ON_GPU = {"grid": {"sparsity": [0.5, 0.6, 0.7]}, "cell": {"max_steps": 90}}


def a_gpu(device):
    """What `load_study` is told on a machine that has one."""
    return device != "cpu"


def test_where_there_is_a_gpu_what_stands_under_it_holds(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(study(on_gpu=ON_GPU))
    here, there = load_study(path), load_study(path, gpu=a_gpu)
    assert (here.enlarged, there.enlarged) == (False, True)
    assert here.grid == {"sparsity": [0.5, 0.6]} and "max_steps" not in here.cell
    assert there.grid == ON_GPU["grid"] and there.cell == {"model": "tiny-llama", "max_steps": 90}
    path.write_text(study())
    assert load_study(path, gpu=a_gpu) == load_study(path)
    path.write_text(study(on_gpu=ON_GPU, cell={"model": "tiny-llama", "device": "cpu"}))
    assert not load_study(path, gpu=a_gpu).enlarged  # there is one, and the file does not want it


@pytest.mark.parametrize("wrong", [[], {}, {"grd": {}}, {"grid": {}}, {"cell": ["max_steps"]}, "more"])
def test_on_gpu_that_is_no_table_of_grid_and_cell(tmp_path, wrong):
    path = tmp_path / "study.yaml"
    path.write_text(study(on_gpu=wrong))
    with pytest.raises(UserError, match=r"on_gpu is no table|no 'grid:'|cell is no table"):
        load_study(path, gpu=a_gpu)


def test_the_demo_asks_more_of_a_gpu():
    demo = ROOT / "configs/demo.yaml"
    cpu, gpu = make_plan(load_study(demo)).configs, make_plan(load_study(demo, gpu=a_gpu)).configs
    assert len(gpu) > len(cpu) and {cell.sparsity for cell in gpu} > {cell.sparsity for cell in cpu}
    assert max(cell.max_steps for cell in gpu) > max(cell.max_steps for cell in cpu)
    assert not [problem for cell in gpu for problem in cell.problems()]
