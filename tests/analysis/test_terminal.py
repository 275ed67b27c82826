from io import StringIO

from rich.console import Console
from synthetic import cell, demo, demo_scored

from sparse_ft.analysis.terminal import print_table, table_text, terminal_table


def printed(rows) -> str:
    return table_text(terminal_table(rows))


def test_the_demo_fits_and_is_not_cut():
    text = printed(demo())
    assert "…" not in text
    assert "smollm2-135m · boolq · unstructured · 5 cells" in text
    assert text.count("sparse to sparse") == text.count("70 % magnitude") == 2
    assert max(map(len, text.splitlines())) <= 100


def test_the_demo_with_a_task_beside_and_recovery_fits_a_hundred_columns():
    text = printed(demo_scored())
    assert max(map(len, text.splitlines())) <= 100 and "recovered" in text and text.count("0.627 ± 0.028") == 5
    head = text.splitlines()[3]
    assert head.split() == ["cell", "xity", "boolq", "piqa", "%", "lations", "utes"]


def test_a_mean_stands_for_several_tasks_beside():
    several = {f"eval/{name}": 0.5 for name in ("piqa/accuracy", "winogrande/accuracy", "mean_accuracy")}
    assert "mean of 2" in printed([cell(metrics=several)]) and "mean of" not in printed(demo_scored())


def test_the_dense_model_as_it_is_has_no_rule_beside_its_name():
    untuned = cell(sparsity=0.0, mode="pruned")
    for rows in ([untuned, cell(mode="pruned", importance="alps")], [untuned, cell(mode="pruned")]):
        text = printed(rows)
        assert "dense, not tuned" in text and " 0 % " not in text and "unstructured · 2 cells" in text
    # Recorded in another rule's line it says so.
    twin = cell(sparsity=0.0, mode="pruned", importance="wanda", tags={"same_as": untuned.run_id})
    assert " 0 % wanda" in printed([untuned, twin, cell(mode="pruned", importance="wanda")])


def test_no_number_is_cut_off_where_models_and_tasks_have_columns_too():
    large = {"eval/perplexity_untuned": 1234567.0}
    rows = [
        cell(model=model, task=task, metrics=large)
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
                        "eval/perplexity_stderr": 2.34, "eval/accuracy_untuned": 0.381})  # fmt: skip
    text = printed([row])
    for part in ("0.625 ± 0.014", "0.381", "440.2 ± 1,234", "31.5 ± 2.3"):
        assert part in text


def test_a_diluted_sparsity_is_seen():
    text = printed([cell(metrics={"sparsity/after_merge": 0.49998, "sparsity/violations": 17})])
    assert "50 → 49.998" in text and "17" in text and "→" not in printed([cell()])


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
