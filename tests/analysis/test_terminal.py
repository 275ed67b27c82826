from io import StringIO

from rich.console import Console
from synthetic import cell, demo

from sparse_ft.analysis.terminal import TERMINAL_WIDTH, terminal_table


def printed(rows) -> str:
    console = Console(file=StringIO(), width=TERMINAL_WIDTH)
    console.print(terminal_table(rows))
    return console.file.getvalue()


def test_the_demo_fits_and_is_not_cut():
    text = printed(demo())
    assert "…" not in text
    assert "smollm2-135m · boolq · 5 cells" in text
    assert text.count("sparse to sparse") == 2
    assert max(map(len, text.splitlines())) <= TERMINAL_WIDTH


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
