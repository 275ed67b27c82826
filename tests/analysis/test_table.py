import math
import sys
import warnings
from dataclasses import replace

import pandas as pd
import pytest
from synthetic import cell, demo, study

from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.table import cell_table, grouped_table
from sparse_ft.errors import UserError
from sparse_ft.tracking.record import Run

TUNED = {"accuracy", "acc_norm", "loss", "perplexity"}


def test_one_row_a_cell_and_only_cells():
    rows = [*demo(), Run("m", status="FINISHED", tags={"kind": "masks"})]
    table = cell_table(rows)
    assert len(table) == 5
    assert table["mode"].tolist()[0] == "dense"
    assert set(table["sparsity"]) == {0.0, 0.5, 0.7}


def test_what_was_not_measured_is_empty():
    table = cell_table([cell(metrics={"eval/loss": math.nan}), cell(sparsity=0.6, status="FAILED")])
    assert table["loss"].isna().all()
    assert math.isnan(table.loc[table["status"] == "FAILED", "accuracy"].item())
    assert math.isnan(table["accuracy_remasked"].iloc[0])  # sparse_to_sparse is not re-masked


def test_a_cell_whose_weights_did_not_move_has_no_score_of_a_tuned_model():
    idle = {"warning": "masks of others; no_weight_moved: training changed no weight"}
    rows = [cell(sparsity=0.5), cell(sparsity=0.6, tags=idle), cell(mode="sparse_to_dense", sparsity=0.6, tags=idle)]
    del rows[1].metrics["eval/accuracy_untuned"]  # it then is the one number there is
    scores = {row.params["cfg/mode"] + row.params["cfg/sparsity"]: row.metrics for row in rows}
    table = cell_table(rows)
    idle = table[table["sparsity"] == 0.6].set_index("mode")
    tuned = [name for name in table if name.removesuffix("_remasked").removesuffix("_stderr") in TUNED]
    assert len(tuned) > 8 and idle[tuned].isna().all(axis=None)
    assert idle.loc["sparse_to_sparse", "accuracy_untuned"] == scores["sparse_to_sparse0.6"]["eval/accuracy"]
    untuned = scores["sparse_to_dense0.6"]["eval/accuracy_untuned"]
    assert idle.loc["sparse_to_dense", "accuracy_untuned"] == untuned
    points = performance_table(table, grouped_table(table))
    reasons = points.set_index("sparsity")["recovery_reason"]
    assert set(reasons[0.6]) == {"it has no accuracy of a tuned model"}
    assert reasons[0.5] == "there is no dense fine-tuned baseline"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_later_attempt_wins_over_the_failed_one(order):
    attempts = [cell(status="FAILED", start=1_000), cell(start=2_000)]
    table = cell_table([attempts[i] for i in order])
    assert table["status"].tolist() == ["FINISHED"]


def test_a_finished_cell_is_not_lost_to_a_later_failure():
    table = cell_table([cell(start=1_000), cell(status="FAILED", start=2_000)])
    assert table["status"].tolist() == ["FINISHED"]


def test_an_attempt_that_died_before_its_mask_has_another_key():
    early = cell(status="FAILED", start=1_000, tags={"cell_key": "no-mask-yet"})
    assert cell_table([early, cell(start=2_000)])["status"].tolist() == ["FINISHED"]


def test_the_latest_of_two_failures_tells_the_reason():
    first = cell(status="FAILED", start=1_000, tags={"failure_class": "disk_full"})
    last = cell(status="FAILED", start=2_000, tags={"failure_class": "timeout"})
    assert cell_table([last, first])["failure_class"].tolist() == ["timeout"]


def test_minutes_are_those_of_the_stores_whole_milliseconds():
    begun, took = 1_700_000_000_123, range(1, 200_000, 997)
    runs = [
        replace(cell(seed=seed), start_time=begun / 1000, end_time=(begun + duration) / 1000)
        for seed, duration in enumerate(took)
    ]
    assert sorted(cell_table(runs)["minutes"]) == [duration / 60_000 for duration in took]


def test_same_as_shows_the_scores_of_the_run_it_names_but_not_its_time():
    ran = cell(sparsity=0.0)
    named = cell(sparsity=0.0, mode="sparse_to_dense", tags={"same_as": ran.run_id})
    named.metrics.clear()
    table = cell_table([ran, named]).set_index("mode")
    assert table.loc["sparse_to_dense", "accuracy"] == ran.metrics["eval/accuracy"]
    assert math.isnan(table.loc["sparse_to_dense", "minutes"])
    assert table.loc["sparse_to_dense", "same_as"] == ran.run_id
    alone = cell_table([named])
    assert math.isnan(alone["accuracy"].item())


def test_same_as_shows_the_warning_of_the_run_it_names():
    idle = "no_weight_moved: training changed no weight"
    ran = cell(sparsity=0.0, tags={"warning": idle})
    named = cell(sparsity=0.0, mode="sparse_to_dense", tags={"same_as": ran.run_id})
    named.metrics.clear()
    table = cell_table([ran, named]).set_index("mode")
    assert table.loc["sparse_to_dense", "warning"] == idle
    assert math.isnan(table.loc["sparse_to_dense", "accuracy"])


def test_dense_has_no_method_whatever_the_defaults_were():
    row = cell(mode="dense", params={"cfg/method": "unstructured", "cfg/sparsity": "0.5"})
    table = cell_table([row])
    assert (table["method"].item(), table["sparsity"].item(), table["series"].item()) == ("none", 0.0, "dense")


def test_a_search_over_learning_rates_is_not_averaged_as_seeds():
    rows = [cell(params={"cfg/learning_rate": rate}, tags={"cell_key": rate}) for rate in ("0.1", "0.2")]
    grouped = grouped_table(cell_table(rows))
    assert sorted(grouped["variant"]) == ["learning_rate=0.1", "learning_rate=0.2"]
    assert grouped["n"].tolist() == [1, 1]


def test_two_evaluation_limits_are_not_averaged_either():
    rows = [cell(), cell(params={"protocol/limit": "100", "cfg/output_dir": "x"}, tags={"cell_key": "other"})]
    assert sorted(grouped_table(cell_table(rows))["variant"]) == ["limit=100", "limit=500"]


def test_a_batch_halved_for_want_of_memory_is_the_same_cell():
    """Its run holds the batch that the plan asks for, and says by a tag that it ran otherwise."""
    rows = [cell(seed=seed, params={"cfg/batch_size": "8"}) for seed in (0, 1)]
    rows[1].tags["reduced_batch"] = "8 -> 4"
    table = cell_table(rows)
    assert grouped_table(table)["n"].tolist() == [2] and table["reduced_batch"].tolist() == [None, "8 -> 4"]


@pytest.mark.parametrize(
    "param",
    ["cfg/batch_size", "cfg/gradient_accumulation", "cfg/device", "cfg/masks", "cfg/data_dir", "cfg/eval_batch_size",
     "identity/weights", "identity/training_data", "identity/scored_data", "identity/dtype", "identity/device",
     "identity/masks", "identity/versions", "protocol/questions_sha256"],
)  # fmt: skip
def test_what_differs_in_anything_but_the_seed_is_no_seed(param):
    rows = [cell(params={param: value}, tags={"cell_key": value}) for value in ("a", "b")]
    rows += [cell(seed=1, params={param: value}, tags={"cell_key": f"{value}1"}) for value in ("a", "b")]
    grouped = grouped_table(cell_table(rows))
    name = param.split("/")[1]
    assert sorted(grouped["variant"]) == [f"{name}=a", f"{name}=b"]
    assert grouped["n"].tolist() == grouped["seeds"].tolist() == [2, 2]


@pytest.mark.parametrize(("name", "behind"), [("device", "device"), ("dtype", "dtype"), ("data_dir", "scored_data")])
def test_two_names_of_one_thing_are_no_difference(name, behind):
    rows = [cell(seed=s, params={f"cfg/{name}": f"name {s}", f"identity/{behind}": "same"}) for s in (0, 1)]
    assert grouped_table(cell_table(rows))["n"].tolist() == [2]


def test_a_failed_cell_does_not_vanish_behind_a_finished_one():
    rows = [cell(params={"cfg/batch_size": "1"}, tags={"cell_key": "one"})]
    rows.append(cell(params={"cfg/batch_size": "16"}, tags={"cell_key": "many"}, status="FAILED", start=2_000))
    assert sorted(cell_table(rows)["status"]) == ["FAILED", "FINISHED"]
    changed = [cell(params={"identity/weights": "old"}, tags={"cell_key": "old"}),
               cell(params={"identity/weights": "new"}, tags={"cell_key": "new"}, status="FAILED")]  # fmt: skip
    assert sorted(cell_table(changed)["status"]) == ["FAILED", "FINISHED"]


def test_a_failure_before_anything_was_known_gives_way_to_a_result():
    rows = [cell(status="FAILED", tags={"cell_key": "early"}), cell(params={"identity/weights": "w"}, start=2_000)]
    assert cell_table(rows)["status"].tolist() == ["FINISHED"]


def test_results_that_a_later_start_replaced_are_left_out():
    rows = [cell(tags={"superseded": "new"}), cell(tags={"cell_key": "new"}, params={"identity/weights": "new"})]
    assert len(cell_table(rows)) == 1


def test_two_results_of_one_seed_are_an_error_that_names_both_runs():
    rows = [cell(start=1_000, tags={"cell_key": "a"}), cell(start=2_000, tags={"cell_key": "b"})]
    with pytest.raises(UserError, match=f"{rows[0].run_id} and {rows[1].run_id}.*seed \\(0\\)"):
        grouped_table(cell_table(rows))
    again = [cell(start=1_000), cell(start=2_000)]  # one key: the same result, twice
    assert grouped_table(cell_table(again))["n"].tolist() == [1]


def test_scope_and_importance_name_the_line_where_they_tell_apart():
    rows = [cell(), cell(params={"cfg/scope": "global"}, tags={"cell_key": "g"}), cell(method="random")]
    assert set(cell_table(rows)["series"]) == {"unstructured magnitude layer", "unstructured magnitude global",
                                               "random"}  # fmt: skip


def test_an_update_besides_names_the_line_and_the_importance():
    update = {"cfg/update": "sparsegpt"}
    rows = [cell(importance="wanda"), cell(importance="wanda", params=update, tags={"cell_key": "u"})]
    rows += [cell(method="random", importance="none", params=update), cell(importance="sparsegpt")]
    rows += [cell(importance="alps", params={"cfg/reconstruct": "block"}, tags={"cell_key": "b"})]
    steps = {"cfg/update": "refit", "cfg/refine": "swaps"}
    rows += [cell(importance="wanda", params=steps, tags={"cell_key": "s"})]
    rows += [cell(importance="alps", params={"cfg/update": "none"}, tags={"cell_key": "n"})]
    rows += [cell(importance="taylor", params={"cfg/update": "auto", "cfg/refine": "none"}, tags={"cell_key": "t"})]
    table = cell_table(rows)
    assert dict(zip(table["series"], table["importance"], strict=True)) == {
        "unstructured wanda": "wanda",
        "unstructured wanda+sparsegpt": "wanda+sparsegpt",
        "random+sparsegpt": "none+sparsegpt",
        "unstructured sparsegpt": "sparsegpt",
        "unstructured wanda+swaps+refit": "wanda+swaps+refit",
        "unstructured alps+none": "alps+none",
        "unstructured alps+block": "alps+block",
        "unstructured taylor": "taylor",
    }
    assert set(table["variant"]) == {""} and len(grouped_table(table)) == 8


def test_mean_deviation_and_error_over_seeds():
    scores = [0.5, 0.6, 0.7]
    metrics = ("accuracy", "loss", "perplexity")
    rows = [
        cell(seed=seed, metrics={f"eval/{m}{e}": v for m in metrics for e, v in (("", score), ("_stderr", 0.02))})
        for seed, score in enumerate(scores)
    ]
    point = grouped_table(cell_table(rows)).iloc[0]
    assert point["n"] == point["seeds"] == 3
    assert point["accuracy"] == pytest.approx(0.6)
    assert point["accuracy_std"] == pytest.approx(0.1)
    for metric in metrics:
        assert point[f"{metric}_error"] == pytest.approx(math.hypot(0.02, 0.1 / math.sqrt(3)))


def test_what_all_seeds_share_is_its_own_mean_and_does_not_deviate():
    """Sums of floats would make 0.10000000000000002 of three times 0.1, and a deviation of 1e-17."""
    shared = {"eval/perplexity_untuned": 883.4003189873405, "sparsity/target": 0.1}
    point = grouped_table(cell_table([cell(seed=seed, metrics=shared) for seed in range(3)])).iloc[0]
    assert (point["sparsity_target"], point["sparsity_target_std"]) == (0.1, 0.0)
    assert (point["perplexity_untuned"], point["perplexity_untuned_std"]) == (883.4003189873405, 0.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, sys.float_info.max, -sys.float_info.max, "inf"])
def test_what_is_no_number_was_not_measured(value):
    """The largest float is what mlflow keeps in sqlite for an infinity."""
    rows = [cell(seed=seed, metrics={"eval/perplexity": found}) for seed, found in enumerate((10.0, value))]
    table = cell_table(rows)
    assert table["perplexity"].tolist()[0] == 10.0 and math.isnan(table["perplexity"].tolist()[1])
    point = grouped_table(table).iloc[0]
    assert point["perplexity"] == 10.0 and math.isnan(point["perplexity_std"])


def test_one_seed_has_the_error_of_its_questions_and_no_deviation():
    point = grouped_table(cell_table([cell(metrics={"eval/accuracy_stderr": 0.02})])).iloc[0]
    assert point["accuracy_error"] == pytest.approx(0.02)
    assert math.isnan(point["accuracy_std"])


def test_failed_cells_are_in_no_mean():
    rows = [cell(seed=0), cell(seed=1, status="FAILED")]
    assert grouped_table(cell_table(rows))["n"].tolist() == [1]


@pytest.mark.parametrize("rows", [[], study()[:1]], ids=["no runs", "no cells"])
def test_an_empty_study_gives_empty_tables_with_their_columns(rows):
    table = cell_table(rows)
    assert table.empty and {"model", "accuracy", "status"} <= set(table)
    grouped = grouped_table(table)
    assert grouped.empty and {"series", "n"} <= set(grouped)


def test_the_full_grid():
    table = cell_table(study())
    assert len(table) == 366
    assert len(grouped_table(table)) == 366
    assert not table.duplicated("run_id").any()


def test_numbers_keep_their_types():
    table = cell_table(demo())
    assert pd.api.types.is_float_dtype(table["sparsity"]) and pd.api.types.is_float_dtype(table["loss"])
    assert table["seed"].tolist() == [0] * 5


def test_runs_with_hundreds_of_parameters_make_one_whole_frame():
    many = {f"cfg/option_{i}": str(i) for i in range(300)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pandas warns of frames that are pieced together
        table = cell_table([cell(params=many), cell(sparsity=0.6, params=many)])
        grouped_table(table)
    assert table["cfg_option_299"].tolist() == ["299", "299"]
