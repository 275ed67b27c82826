"""docs/answer.md: made of the study's numbers and of nothing else, and these of what the study's runs logged."""

import json
import runpy
import shutil

import pandas as pd
import pytest
import yaml
from documents import ROOT
from PIL import Image
from suite import write_suite

from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import load_study
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.runs import Tracker

ANSWER = runpy.run_path(str(ROOT / "docs/answer.py"))
NUMBERS = ROOT / "docs/study"
CONFIG = ROOT / "configs/smollm2.yaml"


@pytest.mark.slow
def test_the_page_is_made_of_the_numbers_to_the_byte(tmp_path):
    assert ANSWER["page"](NUMBERS) == (ROOT / "docs/answer.md").read_text(encoding="utf-8")
    ANSWER["figure"](NUMBERS).savefig(tmp_path / "answer.png", dpi=150)
    with Image.open(tmp_path / "answer.png") as drawn, Image.open(ROOT / "docs/images/answer.png") as kept:
        assert drawn.size == kept.size


def test_the_numbers_are_of_the_study_that_is_shipped():
    cells, facts = pd.read_csv(NUMBERS / "cells.csv"), json.loads((NUMBERS / "study.json").read_text())
    planned = make_plan(load_study(CONFIG)).configs
    assert len(planned) == facts["planned"] >= len(cells) and cells["cell_key"].dropna().is_unique
    asked = {(cell.mode, round(100 * cell.sparsity), cell.seed, cell.recover_steps, cell.teacher) for cell in planned}
    cells = cells.fillna({"cfg_recover_steps": 0, "cfg_teacher": "none"}).query("sparsity > 0")
    ran = zip(*(cells[name] for name in ("mode", "sparsity", "seed", "cfg_recover_steps", "cfg_teacher")), strict=True)
    assert {(mode, round(100 * level), seed, steps, teacher) for mode, level, seed, steps, teacher in ran} <= asked
    assert (cells["sparsity_violations"].dropna() == 0).all()


@pytest.fixture
def line():
    """A study of one line: dense, then 30, 50 and 70 %, and the same after recovery at 50 %."""
    facts = {"tasks": {"piqa": {"samples": "300", "chance": "0.5"}}}

    def row(level, mode, perplexity, accuracy, **others):
        return {"series": "unstructured alps" if level else "unstructured magnitude", "sparsity": level / 100,
                "mode": mode, "seed": 0, "status": "FINISHED", "perplexity": perplexity, "piqa/accuracy": accuracy,
                "perplexity_loss_stderr": 0.05, "piqa/accuracy_stderr": 0.02} | others  # fmt: skip

    recovered = {"perplexity_recovered": 24.0, "perplexity_loss_stderr_recovered": 0.05, "perplexity_untuned": 30.0,
                 "perplexity_loss_stderr_untuned": 0.05, "piqa/accuracy_recovered": 0.63, "piqa/accuracy_untuned": 0.6,
                 "piqa/accuracy_stderr_recovered": 0.02, "piqa/accuracy_stderr_untuned": 0.02,
                 "cfg_recover_steps": 8, "cfg_teacher": "none"}  # fmt: skip
    rows = [row(0, "pruned", 20.0, 0.65), row(30, "pruned", 21.0, 0.64), row(50, "pruned", 30.0, 0.60),
            row(70, "pruned", 900.0, 0.52), row(50, "sparse_to_sparse", 25.0, 0.62, **recovered)]  # fmt: skip
    return pd.DataFrame(rows), facts


def study(tmp_path, cells, facts):
    cells.reindex(columns=ANSWER["KEPT"]).to_csv(tmp_path / "cells.csv", index=False)
    (tmp_path / "study.json").write_text(json.dumps(facts), encoding="utf-8")
    return ANSWER["Study"](tmp_path)


def test_the_best_rule_stands_beside_magnitude(tmp_path, line):
    cells, facts = line
    assert ANSWER["lead"](study(tmp_path, cells, facts)) is None
    magnitude = cells.iloc[0].to_dict() | {"sparsity": 0.5, "perplexity": 400.0}
    found = ANSWER["lead"](study(tmp_path, pd.concat([cells, pd.DataFrame([magnitude])]), facts))
    assert (found["rule"], found["best"].value, found["plain"].value) == ("ALPS", 30, 400)
    assert found["recovered"].value == 24


def test_what_is_kept_and_what_is_surely_lost(tmp_path, line):
    found = study(tmp_path, *line)
    # 95 % of 0.65 is 0.6175: 0.64 keeps it, 0.60 does not, but only 0.52 is two standard errors (0.0552) below.
    assert ANSWER["kept"](found, "unstructured alps", "piqa") == {
        "rule": "ALPS", "up_to": 30, "surely": 70, "lowest": 30}  # fmt: skip
    assert [ANSWER["within"](found, "unstructured alps", factor) for factor in (1.0, 1.1, 1.5, 50)] == [
        None,
        30,
        50,
        70,
    ]


def test_what_training_adds_says_which_differences_are_sure(tmp_path, line):
    rows = ANSWER["added"](study(tmp_path, *line))
    # ln(30 / 24) is 0.223, ln(25 / 24) 0.041, two standard errors 0.141; of the accuracies 0.057.
    assert rows == [
        {"what": "recovery on text", "where": "ALPS, 50 %", "perplexity": "30 → 24", "piqa": "0.600 → 0.630 (*)"},
        {"what": "fine-tuning on the task, after recovery", "where": "ALPS, 50 %", "perplexity": "24 → 25 (*)",
         "piqa": "0.630 → 0.620 (*)"},
    ]  # fmt: skip


def test_what_was_not_run_is_said(tmp_path, line):
    found = ANSWER["missing"](study(tmp_path, *line))
    assert "ALPS, pruned: 10, 20, 40, 60, 80, 90 %" in found and "2:4, magnitude" in found
    assert "sparse to sparse: levels other than 50 %" in found and "sparse to dense" in found


@pytest.mark.slow
def test_the_study_at_a_tiny_size_makes_a_page(tmp_path):
    data = write_suite(tmp_path / "data", rows=6)
    for name in ("boolq", "hellaswag"):
        shutil.copytree(made_data_dir() / name, data / name)
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for table in content["grid"]:
        table["sparsity"] = [0.5]
    small = {"model": "tiny-llama", "data_dir": str(data), "dtype": "float32", "calibration_samples": 4, "lora_r": 2}
    small |= {
        "calibration_seq_len": 32,
        "recover_seq_len": 16,
        "recover_batch_size": 1,
        "max_steps": 1,
        "eval_limit": 2,
    }
    small |= {"batch_size": 2, "max_seq_len": 64, "score_limit": 4, "perplexity_seq_len": 64, "perplexity_tokens": 256}
    content["cell"] |= small
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert sweep(SweepConfig(config=str(tmp_path / "study.yaml"), output_dir=str(tmp_path / "out"))) == 0

    (parent,) = [run for run in Tracker().search() if run.kind == "study"]
    ANSWER["export"](parent.run_id, False, tmp_path / "numbers", tmp_path / "study.yaml")
    page = ANSWER["page"](tmp_path / "numbers")
    cells = pd.read_csv(tmp_path / "numbers/cells.csv")
    assert (cells["status"] == "FINISHED").all() and f"{len(cells)} of {len(cells)} cells finished" in page
    adds = ("recovery on text", "a dense teacher in recovery", "re-masking after the dense adapter")
    adds += ("all weights instead of adapters in recovery",)
    for words in (
        *(f"| {what} | ALPS, 50 % |" for what in adds),
        "| 2:4, magnitude |",
        "tokens/s / dense",
        "draws of its",
    ):
        assert words in page
