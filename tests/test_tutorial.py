"""The tutorial's notebook runs from its first cell to its last, and says what its text says of it."""

import json

import pytest
from documents import ROOT

from sparse_ft.tracking.runs import Tracker


@pytest.mark.slow
def test_the_tutorial_runs_and_keeps_every_zero(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    bodies = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, body in enumerate(bodies, 1):
        exec(compile(body, f"docs/tutorial.ipynb, code cell {number}", "exec"), names)
    assert names["half"].achieved == 0.5 and names["proof"].ok and names["proof"].violations == 0
    assert names["pruned"].metrics["perplexity"] != names["tuned"].metrics["perplexity"]
    assert names["status"] == 0
    shown = capsys.readouterr().out
    assert "50 % magnitude" in shown and "answer: At 70 % sparsity" in shown.replace("\n", " ")
    assert len([run for run in Tracker().search() if run.tags.get("kind") == "cell"]) == 3
