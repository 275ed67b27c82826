from synthetic import cell, demo, study

from sparse_ft.analysis.holes import holes, protocols
from sparse_ft.analysis.table import cell_table


def test_a_complete_study_has_none():
    assert holes(cell_table(study())).empty
    assert holes(cell_table(demo())).empty
    assert holes(cell_table([])).empty


def test_each_kind_of_hole_says_why():
    rows = demo()
    rows.append(cell("smollm2-135m", sparsity=0.8, status="FAILED"))
    rows.append(cell("smollm2-135m", sparsity=0.8, mode="sparse_to_dense", status="KILLED"))
    rows.append(cell("smollm2-135m", sparsity=0.9, status="RUNNING"))
    rows.append(cell("smollm2-135m", sparsity=0.9, mode="sparse_to_dense", metrics={"eval/accuracy": float("nan")}))
    found = holes(cell_table(rows)).set_index(["sparsity", "mode"])
    assert found["reason"].to_dict() == {
        (0.8, "sparse_to_sparse"): "out_of_memory",
        (0.8, "sparse_to_dense"): "killed",
        (0.9, "sparse_to_sparse"): "still_running",
        (0.9, "sparse_to_dense"): "no_score",
    }
    assert "12.1 GB" in found.loc[(0.8, "sparse_to_sparse"), "message"]


def test_what_the_other_models_have_is_missed():
    absent = "synthetic-b|gsm8k|random|magnitude|0.3|sparse_to_dense|0"
    rows = [row for row in study() if row.name != absent]
    found = holes(cell_table(rows))
    assert len(found) == 1
    hole = found.iloc[0]
    assert (hole["model"], hole["task"], hole["method"], hole["sparsity"], hole["mode"], hole["reason"]) == (
        "synthetic-b", "gsm8k", "random", 0.3, "sparse_to_dense", "not_run")  # fmt: skip


def test_levels_of_one_method_are_not_asked_of_another():
    rows = [*study(("a",), ("boolq",), levels=(0.5, 0.7)), cell("a", method="semi_structured", sparsity=0.5)]
    assert set(holes(cell_table(rows))["method"]) <= {"semi_structured"}
    assert holes(cell_table(rows)).empty  # its own modes and levels are all there


def test_a_plan_says_what_was_never_started():
    rows = demo()
    plan = [{"model": "smollm2-135m", "task": "boolq", "method": "unstructured", "importance": "magnitude",
             "scope": "layer", "sparsity": level, "mode": mode, "seed": 0}
            for level in (0.5, 0.7, 0.9) for mode in ("sparse_to_dense", "sparse_to_sparse")]  # fmt: skip
    plan.append({"model": "smollm2-135m", "task": "boolq", "mode": "dense", "seed": 0, "sparsity": 0.5})
    found = holes(cell_table(rows), plan)
    assert found["sparsity"].tolist() == [0.9, 0.9] and set(found["reason"]) == {"not_run"}
    assert len(holes(cell_table([]), plan)) == 7


def test_protocols_sort_what_is_shared_from_what_differs():
    found = protocols(cell_table(study()))
    assert found["shared"]["split"] == "validation"
    assert found["by_task"]["gsm8k"]["num_fewshot"] == "5" and found["by_task"]["boolq"]["num_fewshot"] == "0"
    assert found["varies"] == {} and "num_fewshot" not in found["shared"]
    mixed = protocols(cell_table([cell(), cell(seed=1, params={"protocol/limit": "100"})]))
    assert mixed["varies"] == {"limit": ["100", "500"]}
    assert protocols(cell_table([])) == {"shared": {}, "by_task": {}, "by_model": {}, "varies": {}}


def test_a_planned_cell_is_not_hidden_by_one_that_differs_in_an_axis():
    ran = cell(params={"cfg/batch_size": "1"})
    plan = [{"model": "synthetic-a", "task": "boolq", "method": "unstructured", "importance": "magnitude",
             "scope": "layer", "sparsity": 0.5, "mode": "sparse_to_sparse", "seed": 0, "lora_r": 8,
             "learning_rate": 0.0002, "batch_size": size} for size in (1, 16)]  # fmt: skip
    assert holes(cell_table([ran]), plan)["reason"].tolist() == ["not_run"]
    assert holes(cell_table([ran]), plan[:1]).empty


def test_a_planned_cell_with_a_value_that_no_key_speaks_of_is_not_hidden_by_one_that_has_another():
    """As a study over ``reconstruct_epochs`` asks for: its default stands neither in plans nor in runs."""
    values = {"model": "a", "task": "boolq", "method": "unstructured", "importance": "magnitude", "scope": "layer",
              "sparsity": 0.5, "mode": "sparse_to_sparse", "seed": 0, "lora_r": 8}  # fmt: skip
    plan = [values, values | {"reconstruct_epochs": 4}]
    default, other = cell("a"), cell("a", params={"cfg/reconstruct_epochs": "4"})
    assert [len(holes(cell_table(runs), plan)) for runs in ([default, other], [other], [default])] == [0, 1, 1]
