from io import StringIO

from rich.console import Console
from synthetic import cell, demo

from sparse_ft.analysis.terminal import print_table, table_text, terminal_table


def printed(rows) -> str:
    return table_text(terminal_table(rows))


def test_the_demo_fits_and_is_not_cut():
    text = printed(demo())
    assert "…" not in text
    assert "smollm2-135m · boolq · 5 cells" in text
    assert text.count("sparse to sparse") == 2
    assert max(map(len, text.splitlines())) <= 140


def test_no_number_is_cut_off_where_models_and_tasks_have_columns_too():
    speed = {"train/tokens_per_second": 1234567.0}
    rows = [
        cell(model=model, task=task, metrics=speed)
        for model in ("meta-llama/Llama-2-7b-hf", "tiny-mistral")
        for task in ("boolq", "hellaswag")
    ]
    table = terminal_table(rows)
    assert printed(rows).count("1,234,567") == 4
    for width, terminal in ((80, False), (80, True), (130, True), (300, True)):
        console = Console(file=StringIO(), width=width, force_terminal=terminal)
        print_table(console, table)
        shown = console.file.getvalue()
        assert shown.count("1,234,567") == 4, (width, terminal)
    # Names give way first: as wide as the terminal where that is enough.
    console = Console(file=StringIO(), width=150, force_terminal=True, color_system=None)
    print_table(console, table)
    widths = {len(line.rstrip()) for line in console.file.getvalue().splitlines()}
    assert max(widths) <= 150


def test_before_and_after_tuning():
    row = cell(metrics={"eval/accuracy": 0.625, "eval/accuracy_stderr": 0.014, "eval/perplexity_untuned": 440.25,
                        "eval/perplexity_stderr_untuned": 1234.5, "eval/perplexity": 31.5,
                        "eval/perplexity_stderr": 2.34, "eval/accuracy_untuned": 0.381,
                        "eval/loss": 0.98, "eval/loss_stderr": 0.0412})  # fmt: skip
    text = printed([row])
    for part in ("0.625 ± 0.014", "0.381", "440.2 ± 1,234", "31.5 ± 2.3", "0.980 ± 0.041"):
        assert part in text


def test_a_diluted_sparsity_is_seen():
    text = printed([cell(metrics={"sparsity/after_merge": 0.49998, "sparsity/violations": 17})])
    assert "49.998" in text and "17" in text


def test_failures_and_missing_numbers():
    text = printed([cell(), cell(sparsity=0.9, status="FAILED"), cell(sparsity=0.8, status="RUNNING")])
    assert "out_of_memory" in text and "running" in text and "–" in text


def test_nothing_to_show():
    assert "0 cells" in printed([])


def test_a_merge_that_costs_and_a_cell_that_moved_nothing_are_seen():
    merge = "merge_cost: the loss is 0.820 with the adapter and 1.050 merged (standard error 0.100)"
    idle = "no_weight_moved: training changed no weight; the scores are those of the untuned model"
    text = printed(
        [cell(sparsity=0.5, tags={"warning": merge}), cell(sparsity=0.6, tags={"warning": f"masks; {idle}"})]
    )
    assert text.count("merge_cost") == text.count("no_weight_moved") == text.count("not tuned") == 1
    assert "not tuned" not in printed([cell(tags={"warning": merge}), cell(sparsity=0.6)])
