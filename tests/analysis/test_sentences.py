import pandas as pd
import pytest
from synthetic import cell, demo, study

from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.sentences import answers, kept_level
from sparse_ft.analysis.table import cell_table, grouped_table


def said(rows):
    cells = cell_table(rows)
    return [sentence.text for sentence in answers(cells, performance_table(cells, grouped_table(cells)))]


def scored(accuracy, error=0.001, **options):
    return cell(metrics={"eval/accuracy": accuracy, "eval/accuracy_stderr": error}, **options)


def line(accuracies, **options):
    return [scored(accuracy, sparsity=level, **options) for level, accuracy in accuracies.items()]


DENSE = scored(0.8, mode="dense", sparsity=0.0)


@pytest.mark.parametrize(
    ("recoveries", "expected"),
    [
        ({10: 0.99, 50: 0.96, 60: 0.90}, (50, 60)),
        ({10: 0.99, 50: 0.90, 60: 0.99}, (10, 50)),  # a later rise does not bring it back
        ({10: 0.90}, (None, 10)),
        ({0: 1.0, 10: 0.90}, (None, 10)),
        ({10: 0.99, 90: 1.02}, (90, None)),
        ({10: 0.95}, (10, None)),
    ],
)
def test_the_level_up_to_which_recovery_holds(recoveries, expected):
    table = pd.DataFrame({"sparsity_percent": list(recoveries), "recovery": list(recoveries.values())})
    assert kept_level(table, 0.95) == expected


def test_the_answer_names_a_level_for_each_method():
    rows = [DENSE, *line({0.3: 0.80, 0.6: 0.77, 0.7: 0.6}), *line({0.3: 0.77, 0.6: 0.6}, method="structured")]
    (text,) = said(rows)
    assert text.startswith("BoolQ on synthetic-a keeps 95 % of dense fine-tuned accuracy (0.800 ± 0.001) "
                           "up to 60 % unstructured and 30 % structured, trained sparse to sparse.")  # fmt: skip


def test_a_method_that_keeps_nothing_and_one_that_keeps_all():
    rows = [DENSE, *line({0.3: 0.80, 0.6: 0.79}), *line({0.3: 0.6}, method="random")]
    (text,) = said(rows)
    assert (
        "up to 60 % unstructured (the highest measured), but at no level of random (the lowest measured is 30 %)"
        in (text)
    )


def test_modes_are_told_apart_and_a_dense_merge_is_called_dense():
    rows = [DENSE, *line({0.5: 0.79, 0.7: 0.5}), *line({0.5: 0.79, 0.7: 0.78, 0.8: 0.5}, mode="sparse_to_dense")]
    (text,) = said(rows)
    assert "up to 50 % unstructured, trained sparse to sparse; up to 70 % unstructured, with a dense adapter" in text
    assert "the merged model is then dense" in text


def test_a_level_without_a_score_is_named():
    rows = [DENSE, *line({0.5: 0.79, 0.7: 0.5}), cell(sparsity=0.6, status="FAILED")]
    (text,) = said(rows)
    assert "50 % unstructured (60 % without a score)" in text
    assert "1 of its 4 cells has no result" in text


def test_an_answer_is_refused_where_dense_is_no_better_than_guessing():
    rows = [scored(0.52, 0.05, mode="dense", sparsity=0.0), scored(0.51, 0.05)]
    (text,) = said(rows)
    assert "cannot tell the levels apart" in text and "chance (0.500)" in text and "keeps" not in text
    # The commonest answer is a guess too: BoolQ says yes to 62 %.
    majority = {"protocol/majority": "0.62"}
    rows = [scored(0.63, 0.01, mode="dense", sparsity=0.0, params=majority), scored(0.62, 0.01, params=majority)]
    assert "always giving the commonest answer (0.620)" in said(rows)[0]


def test_no_baseline_no_score_and_another_protocol():
    assert "has no dense fine-tuned baseline" in said([scored(0.7)])[0]
    assert "no cell has a score of a tuned model (0 of 1 finished)" in said([cell(status="FAILED")])[0]
    other = scored(0.8, mode="dense", sparsity=0.0, params={"protocol/num_fewshot": "5"})
    assert "another protocol" in said([other, scored(0.7)])[0]


def test_a_search_says_that_its_best_flatters_itself():
    rows = [scored(0.6 + i / 100, params={"cfg/lora_r": str(i)}, tags={"cell_key": str(i)}) for i in range(1, 4)]
    (text,) = said(rows)
    assert "3 configurations" in text and "lora_r=3" in text and "flatters" in text


def test_perplexity_before_and_after():
    row = cell(metrics={"eval/perplexity_untuned": 441.0, "eval/perplexity": 31.25})
    assert "brings perplexity from 441 to 31.2" in said([DENSE, row])[0]


def test_perplexity_that_tuning_left_alone_or_that_was_not_measured_before():
    row = cell(metrics={"eval/perplexity_untuned": 746.2, "eval/perplexity": 745.9})
    assert "leaves perplexity at 746" in said([DENSE, row])[0]
    row = cell(metrics={"eval/perplexity_untuned": float("nan"), "eval/perplexity": 30.0})
    assert "brings perplexity to 30 (dense" in said([DENSE, row])[0]


def test_one_sentence_a_model_and_task():
    assert len(said(study())) == 6
    assert said([]) == []


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        ({"accuracy": 0.0, "task": "gsm8k"}, "the accuracy of the dense baseline is 0.000"),
        ({"accuracy": 0.8, "params": {"protocol/limit": "7"}}, "the dense baseline was scored under another protocol"),
        ({"accuracy": 0.8, "params": {"cfg/lora_r": "64"}}, "the dense baseline was fine-tuned in another way"),
        ({"accuracy": 0.8, "params": {"identity/weights": "x"}}, "the dense baseline was made of something else"),
    ],
)
def test_each_reason_is_the_one_that_holds(dense, reason):
    """GSM8K's zero accuracy was once called another protocol."""
    values = dict(dense)
    task = values.get("task", "boolq")
    rows = [scored(values.pop("accuracy"), mode="dense", sparsity=0.0, **values), scored(0.0, task=task)]
    (text,) = said(rows)
    assert f"what sparsity costs is not known, because {reason}" in text
    assert sum(other in text for other in ("protocol", "another way", "something else", "is 0.000")) == 1


def test_cells_whose_merge_costs_or_that_trained_nothing_are_counted():
    rows = demo()
    rows[1].tags["warning"] = "merge_cost: the loss is 0.820 with the adapter and 1.050 merged (standard error 0.1)"
    rows[2].tags["warning"] = "no_weight_moved: training changed no weight; the scores are those of the untuned one"
    text = said(rows)[0]
    assert "In 1 of its 5 cells the merge raises the loss on the answers by more than one standard error." in text
    assert "In 1 of its 5 cells training moved no weight" in text
    assert "the merge raises" not in said(demo())[0]


def test_the_rules_are_held_against_each_other_where_there_is_a_choice():
    def row(importance, sparsity, before, after, mode="sparse_to_sparse"):
        metrics = {"eval/accuracy": 0.5, "eval/perplexity": after}
        metrics |= {} if mode == "pruned" else {"eval/perplexity_untuned": before}
        return cell(importance=importance, sparsity=sparsity, mode=mode, metrics=metrics)

    rows = [row("magnitude", 0.5, 300, 200), row("magnitude", 0.7, 60000, 20000), row("alps", 0.5, 44, 40),
            row("alps", 0.7, 136, 90), row("magnitude", 0.9, 1e6, 1e6)]  # fmt: skip
    (text,) = said(rows)
    expected = "At 70 % the perplexity before fine-tuning is 136 with unstructured alps, and 60,000 with unstructured"
    assert f"{expected} magnitude." in text
    assert "At 90 % unstructured magnitude, sparse to sparse fine-tuning" in text
    (text,) = said(rows[:4])
    assert "At 70 % unstructured alps, sparse to sparse fine-tuning brings perplexity from 136 to 90." in text
    assert "before fine-tuning is" not in said(rows[:2])[0]
    (text,) = said([row("magnitude", 0.7, 0, 60000, "pruned"), row("alps", 0.7, 0, 136, "pruned")])
    assert "At 70 % the perplexity before fine-tuning is 136 with unstructured alps" in text
    assert "At 70 % unstructured alps, not fine-tuned, perplexity is 136." in text
