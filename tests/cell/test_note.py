"""A cell's note, in words and numbers."""

from sparse_ft.cell.note import cell_note
from sparse_ft.cell.result import CellResult
from sparse_ft.settings.cell import CellConfig


def test_a_note_is_a_sentence_the_numbers_and_how_to_do_it_again():
    result = CellResult(
        metrics={
            **{"eval/accuracy": 0.75, "eval/accuracy_stderr": 0.01, "eval/loss": 1.5, "eval/perplexity": 1234.5},
            **{"eval/accuracy_untuned": 0.5, "sparsity/achieved": 0.5, "sparsity/after_merge": 0.5},
            "sparsity/violations": 0,
        }
    )
    result.warn("merge_cost: a | b")
    cell = CellConfig(model="tiny-llama", sparsity=0.5, max_steps=7)
    assert cell_note(cell, result, "sparse-ft train --max_steps=7").splitlines() == [
        f"{cell.title}: the model was pruned to 50 % and fine-tuned on boolq for 7"
        " steps; accuracy 0.750; after the merge 50 % of the weights are zero, 0 masked weights are not zero.",
        "",
        "| model&nbsp;&nbsp; | accuracy&nbsp;&nbsp; | loss&nbsp;&nbsp; | perplexity |",
        "| --- | ---: | ---: | ---: |",
        "| pruned&nbsp;&nbsp; | 0.500&nbsp;&nbsp; | –&nbsp;&nbsp; | – |",
        "| tuned&nbsp;&nbsp; | 0.750 ± 0.010&nbsp;&nbsp; | 1.5000&nbsp;&nbsp; | 1,234 |",
        "",
        "**Warning**: merge_cost: a | b",
        "",
        "To do it again:",
        "",
        "```",
        "sparse-ft train --max_steps=7",
        "```",
    ]


def test_what_was_not_pruned_or_not_tuned_is_not_said_to_be():
    dense = cell_note(CellConfig(mode="dense"), CellResult(metrics={"eval/loss": 1.0, "eval/loss_untuned": 2.0}), None)
    assert (
        "pruned" not in dense
        and "| untuned&nbsp;&nbsp; | –&nbsp;&nbsp; | 2.0000&nbsp;&nbsp; | – |" in dense
        and "again" not in dense
    )
    pruned = cell_note(CellConfig(mode="pruned"), CellResult(metrics={"eval/loss": 1.0}), None)
    assert "tuned" not in pruned
    assert "| pruned&nbsp;&nbsp; | –&nbsp;&nbsp; | 1.0000&nbsp;&nbsp; | – |" in pruned
