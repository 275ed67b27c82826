import math

import numpy as np
import pytest
from synthetic import cell, demo, study

from sparse_ft.analysis.performance import (
    chance_level,
    curves,
    dense_baseline,
    majority_level,
    pareto_front,
    performance_table,
)
from sparse_ft.analysis.table import cell_table, grouped_table


def points(rows):
    cells = cell_table(rows)
    return performance_table(cells, grouped_table(cells))


def scored(accuracy, error=0.02, **options):
    return cell(metrics={"eval/accuracy": accuracy, "eval/accuracy_stderr": error}, **options)


def test_recovery_is_the_share_of_dense_fine_tuned_accuracy():
    table = points([scored(0.8, mode="dense", sparsity=0.0), scored(0.6)])
    sparse = table[table["sparsity"] == 0.5].iloc[0]
    assert sparse["recovery"] == pytest.approx(0.75)
    # Error propagation of a quotient, by hand.
    assert sparse["recovery_error"] == pytest.approx(0.75 * math.hypot(0.02 / 0.6, 0.02 / 0.8))
    dense = table[table["mode"] == "dense"].iloc[0]
    assert dense["recovery"] == 1 and math.isnan(dense["recovery_error"])


def test_a_cell_at_zero_sparsity_stands_in_for_dense_only_where_there_is_none():
    zero = scored(0.5, sparsity=0.0)
    assert points([zero, scored(0.4)])["recovery"].tolist() == pytest.approx([1.0, 0.8])
    dense = scored(0.8, mode="dense", sparsity=0.0)
    assert points([dense, zero, scored(0.4)])["recovery"].tolist() == pytest.approx([1.0, 0.625, 0.5])


def test_no_baseline_no_recovery():
    assert points([scored(0.4)])["recovery"].isna().all()
    other = scored(0.8, mode="dense", sparsity=0.0, model="another")
    assert points([other, scored(0.4)])["recovery"].isna().sum() == 1


def test_another_protocol_is_no_baseline():
    dense = scored(0.8, mode="dense", sparsity=0.0, params={"protocol/limit": "100"})
    table = points([dense, scored(0.4)])
    assert math.isnan(table.loc[table["mode"] != "dense", "recovery"].item())


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"protocol/limit": "100"}, "scored under another protocol (limit 500, the baseline's 100)"),
        ({"cfg/max_steps": "5000"}, "fine-tuned in another way (max_steps unknown, the baseline's 5000)"),
        ({"cfg/lora_r": "64"}, "fine-tuned in another way (lora_r 8, the baseline's 64)"),
        ({"protocol/dtype": "bfloat16"}, "scored under another protocol (dtype float32, the baseline's bfloat16)"),
        ({"protocol/device": "NVIDIA H100"}, "scored under another protocol (device cpu, the baseline's gpu)"),
        ({"identity/weights": "other"}, "made of something else (weights unknown, the baseline's other)"),
        ({"identity/training_data": "d"}, "made of something else (training_data unknown, the baseline's d)"),
    ],
)
def test_what_was_made_in_another_way_is_not_divided(params, reason):
    table = points([scored(0.8, mode="dense", sparsity=0.0, params=params), scored(0.4)])
    pruned = table[table["mode"] != "dense"].iloc[0]
    assert math.isnan(pruned["recovery"]) and pruned["recovery_reason"] == f"the dense baseline was {reason}"


def test_recovery_of_nothing_is_not_known():
    for rows, reason in [
        ([scored(0.4)], "there is no dense fine-tuned baseline"),
        ([scored(0.0, mode="dense", sparsity=0.0), scored(0.0)], "the accuracy of the dense baseline is 0.000"),
    ]:
        pruned = points(rows).set_index("mode").loc["sparse_to_sparse"]
        assert math.isnan(pruned["recovery"]) and pruned["recovery_reason"] == reason


def test_full_fine_tuning_has_no_adapter_to_compare():
    dense = scored(0.8, mode="dense", sparsity=0.0, params={"cfg/lora_r": "64"})
    assert points([dense, scored(0.4, mode="full")]).set_index("mode").loc["full", "recovery"] == pytest.approx(0.5)


def test_gains_and_remasking_gaps():
    row = cell(mode="sparse_to_dense", metrics={
        "eval/accuracy": 0.7, "eval/accuracy_untuned": 0.5, "eval/accuracy_remasked": 0.6,
        "eval/perplexity": 20.0, "eval/perplexity_untuned": 400.0, "eval/perplexity_remasked": 30.0,
        "eval/perplexity_stderr": 1.0, "eval/perplexity_stderr_untuned": 40.0, "eval/perplexity_stderr_remasked": 3.0,
    })  # fmt: skip
    point = points([row]).iloc[0]
    assert point["accuracy_gained"] == pytest.approx(0.2) and point["accuracy_remask_gap"] == pytest.approx(0.1)
    assert point["perplexity_ratio_gained"] == 20 and point["perplexity_ratio_remask"] == 1.5
    # Error propagation of a quotient, by hand.
    assert point["perplexity_ratio_gained_error"] == pytest.approx(20 * math.hypot(1 / 20, 40 / 400))
    assert point["perplexity_ratio_remask_error"] == pytest.approx(1.5 * math.hypot(1 / 20, 3 / 30))
    sparse = points([cell()]).iloc[0]
    assert math.isnan(sparse["accuracy_remask_gap"])  # nothing was re-masked


def test_the_baseline_of_a_variant_is_its_own():
    rows = [scored(a, mode="dense", sparsity=0.0, params={"cfg/lora_r": r}, tags={"cell_key": r})
            for a, r in ((0.8, "8"), (0.9, "16"))]  # fmt: skip
    grouped = grouped_table(cell_table(rows))
    assert dense_baseline(grouped, "synthetic-a", "boolq", "lora_r=16")["accuracy"] == 0.9
    assert dense_baseline(grouped, "synthetic-a", "boolq", "lora_r=4") is None


def test_chance_comes_from_the_runs_before_the_table():
    assert chance_level(cell_table([cell()]), "boolq") == 0.5
    assert chance_level(cell_table([cell(params={"protocol/chance": "0.48"})]), "boolq") == 0.48
    assert chance_level(cell_table([cell(task="gsm8k")]), "gsm8k") is None


def test_curves_have_whole_steps_and_finite_values_in_order():
    rows = [cell(sparsity=level) for level in (0.7, 0.1, 0.29)]
    rows.append(cell(sparsity=0.9, metrics={"eval/perplexity": math.inf}))
    (curve,) = curves(cell_table(rows))
    assert [step for step, _ in curve["points"]["eval/accuracy"]] == [10, 29, 70, 90]
    assert [step for step, _ in curve["points"]["eval/perplexity"]] == [10, 29, 70]
    assert all(isinstance(step, int) for step, _ in curve["points"]["eval/accuracy"])
    assert "eval/accuracy_remasked" not in curve["points"]
    assert (curve["model"], curve["task"], curve["mode"]) == ("synthetic-a", "boolq", "sparse_to_sparse")


def test_curves_are_one_a_line_and_their_keys_are_stable():
    first, second = curves(cell_table(study())), curves(cell_table(list(reversed(study()))))
    assert len(first) == 2 * 3 * 3 * 2
    assert len({curve["key"] for curve in first}) == len(first)
    assert {c["key"]: c["points"] for c in first} == {c["key"]: c["points"] for c in second}


def test_seeds_make_one_curve_of_means():
    rows = study(("a",), ("boolq",), ("random",), (0.0, 0.5), ("sparse_to_sparse",), seeds=(0, 1), dense=False)
    (curve,) = curves(cell_table(rows))
    scores = [row.metrics["eval/accuracy"] for row in rows[1:] if row.params["cfg/sparsity"] == "0.5"]
    assert dict(curve["points"]["eval/accuracy"])[50] == pytest.approx(np.mean(scores))


def test_a_single_point_is_no_curve():
    assert curves(cell_table([cell()])) == [] == curves(cell_table([]))
    (fine,) = curves(cell_table([cell(sparsity=level) for level in (0.5, 0.625)]))
    assert ([step for step, _ in fine["points"]["eval/accuracy"]], fine["steps"]) == ([500, 625], "tenths of a percent")
    assert len(curves(cell_table(demo()))) == 2


def test_the_front_is_what_nothing_dominates():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, 60).astype(float), rng.integers(0, 12, 60).astype(float)
    dominated = [any((x[j] >= x[i]) & (y[j] >= y[i]) & ((x[j] > x[i]) | (y[j] > y[i])) for j in range(60))
                 for i in range(60)]  # fmt: skip
    expected = {(x[i], y[i]) for i in range(60) if not dominated[i]}
    assert {(x[i], y[i]) for i in pareto_front(x, y)} == expected


def test_the_commonest_answer_is_known_from_the_runs_or_the_whole_published_split():
    whole = {"protocol/split_rows": "3270"}
    assert majority_level(cell_table([cell(params=whole)]), "boolq") == pytest.approx(0.6217, abs=1e-4)
    assert majority_level(cell_table([cell(params=whole | {"protocol/majority": "0.7"})]), "boolq") == 0.7
    assert majority_level(cell_table([cell(params={"protocol/split_rows": "40"})]), "boolq") is None
    assert majority_level(cell_table([cell()]), "boolq") is None


def test_curves_of_one_panel_have_colours_of_their_own():
    found = [c for c in curves(cell_table(study())) if (c["model"], c["task"]) == ("synthetic-a", "boolq")]
    assert len({curve["colour"] for curve in found if curve["mode"] != "dense"}) == 6  # 3 methods x 2 modes
