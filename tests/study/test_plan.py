from collections import Counter
from pathlib import Path

import pytest

from sparse_ft.errors import UserError
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import Study, load_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def grid():
    return {
        "model": ["tiny-llama", "tiny-mistral"],
        "task": ["boolq", "hellaswag", "gsm8k"],
        "method": ["unstructured", "structured", "random"],
        "sparsity": [i / 10 for i in range(10)],
        "mode": ["sparse_to_dense", "sparse_to_sparse"],
    }


def test_the_grid_is_a_product_with_a_dense_baseline_per_model_and_task(grid):
    plan = make_plan(Study("full", grid))
    modes = Counter(cell.mode for cell in plan.configs)
    assert modes == {"sparse_to_dense": 180, "sparse_to_sparse": 180, "dense": 6}
    assert len({cell.key() for cell in plan.configs}) == len(plan.cells)
    assert [cell.mode for cell in plan.configs[:6]] == ["dense"] * 6


def test_every_cell_has_a_name_of_its_own():
    grid = {"model": ["tiny-llama"], "sparsity": [0.5], "seed": [0, 1], "scope": ["layer", "global"], "lora_r": [8]}
    plan = make_plan(Study("s", grid, {}))
    assert tuple(cell.title for cell in plan.cells) == (
        "dense · boolq · tiny-llama · seed 0",
        "dense · boolq · tiny-llama · seed 1",
        "50 % s2s unstructured magnitude · boolq · tiny-llama · seed 0, scope layer",
        "50 % s2s unstructured magnitude · boolq · tiny-llama · seed 0, scope global",
        "50 % s2s unstructured magnitude · boolq · tiny-llama · seed 1, scope layer",
        "50 % s2s unstructured magnitude · boolq · tiny-llama · seed 1, scope global",
    )
    plain = make_plan(Study("s", {"model": ["tiny-llama"], "sparsity": [0.5]}, {}))
    assert [cell.title for cell in plain.cells] == [cell.title for cell in plain.configs]


def test_without_a_baseline_there_is_none(grid):
    assert len(make_plan(Study("full", grid, dense_baseline=False)).cells) == 360


def test_masks_are_shared_by_all_cells_that_need_the_same(grid):
    plan = make_plan(Study("full", grid))
    assert len(plan.mask_sets) == 6  # 2 models x 3 methods: data-free masks do not depend on the task
    for planned in plan.cells:
        cell, number = planned.config, planned.masks
        if cell.mode == "dense":
            assert number is None
        else:
            config = plan.mask_sets[number].config
            assert (config.model, config.method) == (cell.model, cell.method)
            assert cell.sparsity in config.levels
    assert len({item.name for item in plan.mask_sets}) == 6


def test_calibrated_masks_are_one_set_a_task(grid):
    study = Study("wanda", grid | {"method": ["unstructured"]}, {"importance": "wanda", "scope": "row"})
    assert len(make_plan(study).mask_sets) == 6  # 2 models x 3 tasks


def test_seeds_make_random_masks_anew_and_magnitude_masks_not(grid):
    seeds = {"model": ["tiny-llama"], "method": ["unstructured", "random"], "seed": [0, 1, 2]}
    assert len(make_plan(Study("seeds", seeds)).mask_sets) == 1 + 3


def test_cell_values_apply_everywhere():
    plan = make_plan(Study("s", {"sparsity": [0.5]}, {"max_steps": 3, "lora_r": 2}))
    assert {(cell.max_steps, cell.lora_r) for cell in plan.configs} == {(3, 2)}


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (Study("s", {"sparsitty": [0.5]}), "no field 'sparsitty'"),
        (Study("s", {"mode": ["thin"]}), "mode is 'thin'"),
        (Study("s", {"sparsity": [1.5]}), "sparsity is 1.5"),
        (Study("s", {"sparsity": [0.5]}, {"max_step": 3}), "no field 'max_step'"),
    ],
)
def test_wrong_fields_and_values_are_named(study, message):
    with pytest.raises(UserError, match=message):
        make_plan(study)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_study_makes_a_plan_and_says_how_to_run_it(path):
    assert make_plan(load_study(path)).cells
    first = path.read_text().splitlines()[0]
    assert first.startswith("# mlflow run . ")
    assert f"config=configs/{path.name}" in first or path.name == "demo.yaml"


def test_the_axis_that_stands_commented_in_the_full_study_makes_a_plan(tmp_path):
    text = (ROOT / "configs/full.yaml").read_text(encoding="utf-8")
    axis = "  # importance: [magnitude, taylor]"
    assert text.count(axis) == 1
    path = tmp_path / "full.yaml"
    path.write_text(text.replace(axis, axis.replace("# ", "")).replace("  importance: magnitude\n", ""))
    plan = make_plan(load_study(path))
    assert len(plan.cells) - len(make_plan(load_study(ROOT / "configs/full.yaml")).cells) == 240
    assert not [problem for cell in plan.configs for problem in cell.problems()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {model: [a", "not valid YAML"),
        ("name: x", "no 'grid:'"),
        ("grid: []", "no 'grid:'"),
        ("grid: [{seed: [1]}, {}]", "no 'grid:'"),
        ("grid: [{seed: [1]}, 3]", "grid is no table"),
        ("grid: [{seed: [1]}, {3: [1]}]", "grid has the key 3"),
        ("grid: [{seed: [1]}, {seed: []}]", "'seed' of the grid is empty"),
        ("grid: {model: []}", "'model' of the grid is empty"),
        ("grid: {seed: [1]}\nworkers: 3", "unknown key 'workers'"),
        ("grid: {sparsity: half}", "sparsities is 'half'"),
    ],
)
def test_a_study_file_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(path)


def test_sparsities_may_be_a_range(tmp_path):
    path = tmp_path / "levels.yaml"
    path.write_text("grid: {sparsity: '0:0.3:0.1'}")
    study = load_study(path)
    assert (study.name, study.grid["sparsity"]) == ("levels", [0.0, 0.1, 0.2, 0.3])


def test_a_grid_may_be_several_tables_and_cells_in_two_of_them_are_one(tmp_path):
    path = tmp_path / "parts.yaml"
    path.write_text("""
grid:
  - {importance: [magnitude, wanda], sparsity: [0.5], mode: [pruned]}
  - {importance: [wanda], sparsity: [0.5, 0.7], recover_steps: [5], mode: [pruned, sparse_to_sparse]}
cell: {model: tiny-llama}
""")
    study = load_study(path)
    cells = [cell for cell in make_plan(study).configs if cell.sparsity > 0 and cell.mode != "dense"]
    # The pruned cells have no recovery: that of Wanda at 50 % is in both tables.
    assert sorted((cell.importance, cell.sparsity, cell.mode) for cell in cells) == [
        ("magnitude", 0.5, "pruned"),
        ("wanda", 0.5, "pruned"),
        ("wanda", 0.5, "sparse_to_sparse"),
        ("wanda", 0.7, "pruned"),
        ("wanda", 0.7, "sparse_to_sparse"),
    ]
    assert len(study.plain()["grid"]) == 2 and make_plan(study).key == make_plan(load_study(path)).key


def test_a_study_without_training_is_held_against_the_dense_model_without_training():
    grid = {"model": ["tiny-llama"], "importance": ["magnitude", "wanda"], "sparsity": [0, 0.5], "mode": ["pruned"]}
    plan = make_plan(Study("s", grid, {"learning_rate": 1e-3}))
    assert [(cell.mode, cell.sparsity, cell.importance) for cell in plan.configs] == [
        ("pruned", 0, "magnitude"), ("pruned", 0.5, "magnitude"), ("pruned", 0, "wanda"), ("pruned", 0.5, "wanda")
    ]  # fmt: skip
    assert [cell.same_as for cell in plan.cells] == [None, None, 0, None]
    only = make_plan(Study("s", grid | {"sparsity": [0.5], "importance": ["wanda"]}, {}))
    assert [(cell.mode, cell.sparsity, cell.importance) for cell in only.configs] == [
        ("pruned", 0, "magnitude"), ("pruned", 0.5, "wanda")
    ]  # fmt: skip
    both = make_plan(Study("s", grid | {"mode": ["pruned", "sparse_to_sparse"], "sparsity": [0.5]}, {}))
    assert [cell.mode for cell in both.configs[:2]] == ["pruned", "dense"]
