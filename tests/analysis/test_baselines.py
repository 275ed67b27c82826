import csv
from importlib import resources

import pytest
from synthetic import cell, study

from sparse_ft.analysis.baselines import BASELINE_COLUMNS, compare_baseline, load_baseline, model_key
from sparse_ft.analysis.table import cell_table, grouped_table
from sparse_ft.errors import UserError

PROTOCOL = "task_version=2.0; num_fewshot=0; split=validation; limit=500"
ROW = {
    "model": "org/Synthetic_A",
    "task": "boolq",
    "method": "unstructured",
    "importance": "",
    "sparsity": "0.5",
    "mode": "sparse_to_sparse",
    "accuracy": "0.8",
    "perplexity": "",
    "throughput": "",
    "source": "a paper",
    "protocol": PROTOCOL,
}


def written(tmp_path, *rows, drop=()):
    path = tmp_path / "baseline.csv"
    names = [name for name in BASELINE_COLUMNS if name not in drop]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([ROW | row for row in rows])
    return path


def compared(tmp_path, *rows, cells=None):
    table = cell_table(cells or [cell(), cell(mode="dense", sparsity=0.0)])
    return compare_baseline(load_baseline(written(tmp_path, *rows)), table, grouped_table(table))


def test_equal_protocols_join(tmp_path):
    ours = cell(metrics={"eval/accuracy": 0.79, "eval/accuracy_stderr": 0.018})
    result = compared(tmp_path, {}, cells=[ours])
    assert result["not_comparable"].empty
    joined = result["joined"].iloc[0]
    assert joined["ours"] == 0.79 and joined["published"] == 0.8
    assert joined["difference"] == pytest.approx(-0.01) and joined["ours_error"] == pytest.approx(0.018)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"protocol": PROTOCOL.replace("num_fewshot=0", "num_fewshot=5")}, "num_fewshot is 5, here 0"),
        ({"protocol": PROTOCOL.replace("limit=500", "limit=none")}, "limit is none, here 500"),
        ({"protocol": "num_fewshot=0; split=validation"}, "does not state task_version, limit"),
        ({"protocol": PROTOCOL + "; harness=old"}, "harness is old, here not stated"),
        ({"model": "another"}, "no cell of this model"),
        ({"task": "gsm8k"}, "no cell of this task"),
        ({"method": "structured"}, "no cell with this method"),
        ({"importance": "wanda"}, "no cell with this method"),
        ({"sparsity": "0.4"}, "no cell at this sparsity"),
        ({"mode": "sparse_to_dense"}, "no cell in this mode"),
        ({"accuracy": "", "throughput": "12"}, "what throughput counts"),
    ],
)
def test_what_is_not_comparable_says_why(tmp_path, row, reason):
    result = compared(tmp_path, row)
    assert result["joined"].empty
    assert reason in result["not_comparable"]["reason"].item()


def test_all_questions_equal_no_limit(tmp_path):
    ours = cell(params={"protocol/limit": "None"})
    row = {"protocol": PROTOCOL.replace("limit=500", "limit=none")}
    assert len(compared(tmp_path, row, cells=[ours])["joined"]) == 1


def test_the_pruned_model_before_tuning_is_mode_untuned(tmp_path):
    ours = cell(metrics={"eval/perplexity_untuned": 7.0},
                params={"protocol/perplexity_corpus": "wiki", "protocol/perplexity_windows": "9"})  # fmt: skip
    protocol = "perplexity_corpus=wiki; perplexity_seq_len=256; perplexity_windows=9"
    row = {"task": "any", "mode": "untuned", "accuracy": "", "perplexity": "7.5", "protocol": protocol}
    joined = compared(tmp_path, row, cells=[ours])["joined"].iloc[0]
    assert joined["measure"] == "perplexity_untuned" and joined["difference"] == pytest.approx(-0.5)
    longer = row | {"protocol": protocol.replace("256", "2048")}
    assert "perplexity_seq_len is 2048, here 256" in (
        compared(tmp_path, longer, cells=[ours])["not_comparable"]["reason"].item()
    )


def test_a_pruned_cell_stands_beside_mode_untuned_by_its_own_score(tmp_path):
    ours = cell(params={"cfg/mode": "pruned", "protocol/perplexity_corpus": "wiki", "protocol/perplexity_windows": "9"},
                metrics={"eval/perplexity": 7.0})  # fmt: skip
    protocol = "perplexity_corpus=wiki; perplexity_seq_len=256; perplexity_windows=9"
    row = {"task": "any", "mode": "untuned", "accuracy": "", "perplexity": "7.5", "protocol": protocol}
    joined = compared(tmp_path, row, cells=[ours])["joined"].iloc[0]
    assert joined["measure"] == "perplexity_untuned" and joined["difference"] == pytest.approx(-0.5)


def test_a_throughput_joins_on_its_own_conditions(tmp_path):
    protocol = "throughput=eval_samples_per_second; device=cpu; dtype=float32; batch_size=8"
    row = {"accuracy": "", "throughput": "50", "protocol": protocol}
    assert compared(tmp_path, row)["joined"]["measure"].tolist() == ["eval_samples_per_second"]
    other = row | {"protocol": protocol.replace("device=cpu", "device=WSE-3")}
    assert "device is WSE-3, here cpu" in compared(tmp_path, other)["not_comparable"]["reason"].item()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"accuracy": "68.9"}, "line 2: accuracy is 68.9; it must be a fraction"),
        ({"accuracy": ""}, "line 2: it gives none of"),
        ({"mode": "magic"}, "line 2: mode is magic"),
        ({"sparsity": ""}, "sparsity is empty"),
        ({"sparsity": "half"}, "sparsity is half; it must be a number"),
        ({"source": ""}, "source is empty"),
        ({"protocol": "zero-shot"}, "key=value"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_baseline(written(tmp_path, row))


def test_missing_columns_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="lacks the columns sparsity"):
        load_baseline(written(tmp_path, {}, drop=("sparsity",)))
    with pytest.raises(UserError, match="cannot read the baseline"):
        load_baseline(tmp_path / "nothing.csv")
    assert len(load_baseline(written(tmp_path, {}, drop=("importance", "perplexity", "throughput")))) == 1


def test_the_published_tables_load_with_their_sources():
    table = load_baseline("builtin")
    assert table["source"].str.contains("arXiv").all()
    shears = table[table["source"].str.contains("Shears")].set_index(["task", "sparsity"])["accuracy"]
    # As the README beside the paper's code gives them.
    for task, scores in {"boolq": (0.689, 0.670, 0.673), "hellaswag": (0.781, 0.801, 0.733),
                         "gsm8k": (0.375, 0.368, 0.361)}.items():  # fmt: skip
        assert tuple(shears[task, level] for level in (0.0, 0.4, 0.5)) == scores
    llama2 = table[(table["model"] == "llama-2-7b") & (table["sparsity"] == 0)]
    assert llama2["perplexity"].item() == 5.12 and "perplexity_seq_len=4096" in llama2["protocol"].item()


def test_published_tables_do_not_join_a_study_they_do_not_fit():
    table = cell_table(study(("meta-llama/Llama-2-7b-hf",), ("boolq",), importance="wanda"))
    result = compare_baseline(load_baseline("builtin"), table, grouped_table(table))
    assert result["joined"].empty
    assert result["not_comparable"]["reason"].str.len().min() > 0


def test_the_template_has_columns_and_no_numbers():
    text = (resources.files("sparse_ft.analysis") / "data" / "phoenix_template.csv").read_text("utf-8")
    assert text.split() == [",".join(BASELINE_COLUMNS)]


def test_names_of_one_model_agree():
    names = ("meta-llama/Llama-2-7b-hf", "llama-2-7b", "/models/Llama2_7B/")
    assert len({model_key(name) for name in names}) == 1
    assert model_key("yahma/llama-7b-hf") != model_key("llama-2-7b")


def test_a_uniform_allocation_is_not_held_against_owl(tmp_path):
    ours = cell(params={"cfg/allocation": "owl"}, metrics={"eval/perplexity_untuned": 7.0})
    protocol = {"perplexity": "8", "accuracy": "", "mode": "untuned"}
    stated = (
        ";".join(f"{key}={ours.params[f'protocol/{key}']}" for key in ("perplexity_corpus", "perplexity_seq_len"))
        + ";perplexity_windows=1"
    )
    ours.params["protocol/perplexity_windows"] = "1"
    same = compared(tmp_path, protocol | {"protocol": stated + ";allocation=owl"}, cells=[ours])
    other = compared(tmp_path, protocol | {"protocol": stated + ";allocation=uniform"}, cells=[ours])
    assert len(same["joined"]) == 1
    assert "allocation is uniform, here owl" in other["not_comparable"]["reason"].item()
