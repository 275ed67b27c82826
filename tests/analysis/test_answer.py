import pytest
from synthetic import cell, demo_scored, study

from sparse_ft.analysis.answer import ENOUGH, one_sentence, signals
from sparse_ft.analysis.beside import beside_cells, beside_points
from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.table import cell_table, grouped_table
from sparse_ft.analysis.write import write_analysis


def said(runs) -> str:
    """The sentence, with the accuracies of all tasks that can tell models apart, as the analysis makes it."""
    cells = cell_table(runs)
    points, others = performance_table(cells, grouped_table(cells)), beside_cells(cells)
    beside = beside_points(others)
    alone = beside[beside["scored"] != "mean"]
    return one_sentence(cells, points, alone)


def test_the_demo_in_a_sentence_that_is_made_of_its_numbers():
    assert said(demo_scored()) == (
        "At 50 % sparsity the rule decides: perplexity is 40.8 ± 1.9 with alps and 387 ± 58 with magnitude (dense 22.6"
        " ± 2.4); recovery with fine-tuning lowers alps from 40.8 ± 1.9 to 33.3 ± 1.5, with every zero kept; accuracy"
        " on PIQA is 0.627 ± 0.028 against 0.627 ± 0.028 dense fine-tuned, which is no difference (0.0 standard"
        " errors)."
    )


@pytest.mark.parametrize(
    ("number", "metrics", "text"),
    [
        (2, {"eval/perplexity": 42.0, "eval/perplexity_stderr": 2.0}, "the rules cannot be told apart: perplexity is"),
        (4, {"eval/perplexity": 38.5}, "to 38.5 ± 1.5, 1.0 standard errors if the two are taken as independent, with"),
        (4, {"eval/perplexity": 60.0}, "raises alps from 40.8 ± 1.9 to 60 ± 1.5, with"),
        (4, {"sparsity/violations": 3}, "with 3 zeros lost"),
        (4, {"eval/piqa/accuracy": 0.5}, "against 0.627 ± 0.028 dense fine-tuned, 3.2 standard errors less"),
    ],
)  # fmt: skip
def test_standard_errors_are_respected(number, metrics, text):
    runs = demo_scored()
    runs[number].metrics.update(metrics)
    assert text in said(runs)


def test_without_a_dense_fine_tuned_model_it_is_beside_the_dense_one():
    _, *runs = demo_scored()
    assert "accuracy on PIQA is 0.627 ± 0.028 against 0.627 ± 0.028 of the dense model, which is no" in said(runs)
    assert "(dense 22.6 ± 2.4)" in said(runs)


def test_nothing_is_said_of_several_models_or_of_nothing_pruned():
    assert said(study(levels=(0.5,))) == "" and said([cell(sparsity=0.0, mode="dense")]) == ""


def test_how_far_above_guessing_the_dense_model_is():
    runs = demo_scored()
    others = beside_cells(cell_table(runs))
    found = {signal.task: signal for signal in signals(others, beside_points(others))}
    assert found["piqa"].errors == pytest.approx((0.627 - 0.5) / 0.028) and found["piqa"].errors > ENOUGH
    assert str(found["piqa"]) == (
        "PIQA (the first 300 questions of validation): the dense model (0.627 ± 0.028) is 4.5 standard errors above"
        " guessing (0.500), so accuracy on it can tell models apart."
    )


def test_a_dense_model_that_only_guesses_is_said_to_and_its_accuracy_is_no_answer(tmp_path):
    runs = demo_scored()
    for run in runs:
        run.metrics.update({"eval/accuracy": 0.375, "eval/accuracy_stderr": 0.078, "eval/accuracy_untuned": 0.375})
        run.metrics.update({"eval/accuracy_stderr_untuned": 0.078})
        run.params.update({"protocol/chance": "0.5", "protocol/majority": "0.7", "protocol/samples": "40"})
    result = write_analysis(runs, tmp_path, figures=False)
    own, beside = result.signals
    assert "-" not in str(own) and "is 4.2 standard errors below always giving the commonest answer (0.700)" in str(own)
    assert "so accuracy on it says little here" in str(own) and beside.task == "piqa"
    assert "PIQA" in result.answer and "BoolQ" not in result.answer
    page = result.report.read_text(encoding="utf-8")
    assert result.answer in page and str(own) in page
