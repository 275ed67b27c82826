"""docs/answer.md and its figure, from the numbers of the study in docs/study/: nothing on the page is typed by hand.

python docs/answer.py                       # the page and docs/images/answer.png, from docs/study/
python docs/answer.py --export RUN --busy   # docs/study/, from the study's run (needs its MLflow store)
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from sparse_ft.analysis.numbers import shown, shown_with_error
from sparse_ft.analysis.style import COLOURS, DENSE, RULE, drawing
from sparse_ft.cli import run as command
from sparse_ft.settings import modes
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import load_study
from sparse_ft.tracking.runs import Tracker

DOCS = Path(__file__).resolve().parent
CONFIG = DOCS.parent / "configs" / "smollm2.yaml"
SHARE = 0.95  # of the dense score
SURE = 2  # standard errors
LEVELS = [10, 20, 30, 40, 50, 60, 70, 80, 90]
RULES = {"unstructured magnitude": "magnitude", "unstructured wanda": "Wanda", "unstructured sparsegpt": "SparseGPT",
         "unstructured alps": "ALPS", "random": "random"}  # fmt: skip
OTHERS = {"structured magnitude": "structured, magnitude", "structured taylor": "structured, Taylor",
          "semi_structured magnitude": "2:4, magnitude", "semi_structured alps": "2:4, ALPS"}  # fmt: skip
TASKS = {"piqa": "PIQA", "hellaswag": "HellaSwag"}
STAGES = ("_untuned", "_recovered", "", "_remasked")
KEPT = [
    "name", "method", "importance", "series", "scope", "sparsity", "mode", "seed", "status", "failure_class",
    "cfg_recover_steps", "cfg_teacher", "sparsity_achieved", "sparsity_violations",
    *(f"{name}{after}" for name in ("perplexity", "perplexity_stderr", "perplexity_loss", "perplexity_loss_stderr")
      for after in STAGES),
    *(f"{task}/{name}{after}" for task in TASKS for name in ("accuracy", "accuracy_stderr") for after in STAGES),
    "measured_tokens_per_second", "measured_bytes", "minutes", "cell_key",
]  # fmt: skip


# --- from the store into docs/study ---


def export(run_id: str, busy: bool, folder: Path, config: Path = CONFIG) -> None:
    """Writes ``cells.csv``, from what ``sparse-ft analyze`` writes of the study, and ``study.json``: where it ran."""
    with tempfile.TemporaryDirectory() as scratch:
        assert command("analyze", ["--parent_run_id", run_id, "--output_dir", scratch], "analyze") == 0
        table = pd.read_csv(Path(scratch) / "summary.csv")
    runs = Tracker.reading(run_id=run_id)
    study = runs.run(run_id)
    children = [run for run in runs.search() if run.parent_run_id == run_id]
    first = next(run for run in children if run.kind == "cell" and run.is_finished)
    tasks = {}
    for task in TASKS:
        text = table[f"protocol_score/{task}"].dropna().iloc[0]
        tasks[task] = dict(part.split("=", 1) for part in text.split("; "))
    day = [time.strftime("%Y-%m-%d", time.gmtime(value)) for value in (study.start_time, time.time())]
    facts = {
        "commit": study.tags["mlflow.source.git.commit"],
        "machine": first.tags["device_name"],
        "threads": int(table["protocol_train_threads"].dropna().iloc[0]),
        "busy": busy,
        "versions": {name: study.tags[f"version/{name}"] for name in ("python", "torch", "transformers", "lm_eval")},
        "day": day[0],
        "planned": len(make_plan(load_study(config)).cells),
        "cut_off": sum(run.status == "KILLED" for run in children),
        "tasks": tasks,
    }
    folder.mkdir(exist_ok=True)
    table.reindex(columns=KEPT).to_csv(folder / "cells.csv", index=False, float_format="%.6g")
    (folder / "study.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# --- what the numbers say ---


@dataclass(frozen=True)
class Score:
    """A number with its standard error; ``log`` where the error is known of its logarithm."""

    value: float
    error: float
    log: bool = False

    def __str__(self) -> str:
        return shown_with_error(self.value, self.value * self.error if self.log else self.error, self.form)

    @property
    def form(self) -> str:
        return ",.4g" if self.log else ".3f"

    def surely_above(self, other: Score, share: float = 1.0) -> bool:
        """Whether it is more than `share` of the other by more than `SURE` standard errors of the difference."""
        if self.log:
            gap, error = math.log(self.value / (share * other.value)), math.hypot(self.error, other.error)
        else:
            gap, error = self.value - share * other.value, math.hypot(self.error, share * other.error)
        return gap > SURE * error

    def beside(self, other: Score) -> str:
        """What became of the other: both, and whether they surely differ."""
        sure = self.surely_above(other) or other.surely_above(self)
        return f"{shown(other.value, other.form)} → {shown(self.value, self.form)}{'' if sure else ' (*)'}"


def score(row: Any, name: str, after: str = "") -> Score | None:
    """``perplexity`` or a task's accuracy of a row; None where it was not measured."""
    if row is None:
        return None
    log = name == "perplexity"
    value = row.get(f"{name}{after}" if log else f"{name}/accuracy{after}", math.nan)
    error = row.get(f"perplexity_loss_stderr{after}" if log else f"{name}/accuracy_stderr{after}", math.nan)
    return None if pd.isna(value) else Score(float(value), float(error), log)


class Study:
    """The cells that finished, and how to find them."""

    def __init__(self, folder: Path):
        self.all = pd.read_csv(folder / "cells.csv", dtype={"cfg_teacher": object}).fillna(
            {"cfg_recover_steps": 0, "cfg_teacher": "none"}
        )
        self.facts = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        self.config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        self.cells = self.all[self.all["status"] == "FINISHED"]

    def found(self, series: str, level: int, mode: str, **other: Any) -> list[dict[str, Any]]:
        """Rows of a line at a level in percent, the first seed first."""
        cells = self.cells
        where = (cells["series"] == series) & (cells["mode"] == mode) & ((100 * cells["sparsity"]).round() == level)
        for name, value in other.items():
            where &= cells[name] == value
        return cells[where].sort_values("seed").to_dict("records")

    def pruned(self, series: str, level: int, name: str) -> Score | None:
        """The score of a model that was pruned and not tuned."""
        rows = self.found(series, level, modes.PRUNED.name)
        return next((found for row in rows if (found := score(row, name))), None)

    def dense(self, name: str) -> Score:
        """The score of the model as it is."""
        found = self.pruned("unstructured magnitude", 0, name)
        assert found is not None
        return found

    def trained(self, series: str, level: int, mode: str, steps: int, teacher: str = "none") -> dict[str, Any] | None:
        """The row of a model that was tuned."""
        rows = self.found(series, level, mode, cfg_recover_steps=steps, cfg_teacher=teacher)
        return rows[0] if rows else None

    @property
    def steps(self) -> int:
        """Of recovery."""
        return int(self.cells["cfg_recover_steps"].max())


def kept(study: Study, series: str, name: str) -> dict[str, Any]:
    """Up to which of the levels measured `SHARE` of the dense accuracy is kept, and from which it is surely lost."""
    dense, up_to, surely = study.dense(name), None, None
    measured = [(level, found) for level in LEVELS if (found := study.pruned(series, level, name))]
    for level, found in measured:
        if found.value < SHARE * dense.value:
            break
        up_to = level
    for level, found in reversed(measured):
        bound = Score(SHARE * dense.value, SHARE * dense.error)
        if not bound.surely_above(found):
            break
        surely = level
    return {"rule": RULES[series], "up_to": up_to, "surely": surely, "lowest": measured[0][0] if measured else None}


def lead(study: Study, level: int = 50) -> dict[str, Any] | None:
    """The best rule at a level by perplexity, magnitude beside it, and what recovery brings it to."""
    found = {series: one for series in RULES if (one := study.pruned(series, level, "perplexity"))}
    plain = found.pop("unstructured magnitude", None)
    if not found or plain is None:
        return None
    best = min(found, key=lambda series: found[series].value)
    row = study.trained(best, level, modes.SPARSE_TO_SPARSE.name, study.steps)
    return {"rule": RULES[best], "level": level, "best": found[best], "plain": plain,
            "recovered": score(row, "perplexity", "_recovered")}  # fmt: skip


def within(study: Study, series: str, factor: float) -> int | None:
    """The highest level measured up to which perplexity is at most ``factor`` times the dense one."""
    best = None
    for level in LEVELS:
        found = study.pruned(series, level, "perplexity")
        if found and found.value > factor * study.dense("perplexity").value:
            break
        best = level if found else best
    return best


def added(study: Study) -> list[dict[str, str]]:
    """What each stage of training changes: two scores of cells that differ in nothing else."""
    rows = []
    s2s, s2d, full = modes.SPARSE_TO_SPARSE.name, modes.SPARSE_TO_DENSE.name, modes.FULL.name

    def row(what: str, rule: str, level: int, before: tuple[Any, str], after: tuple[Any, str]) -> None:
        cells = {}
        for name in ("perplexity", "piqa"):
            first, then = score(before[0], name, before[1]), score(after[0], name, after[1])
            if first is None or then is None:
                return
            cells[name] = then.beside(first)
        rows.append({"what": what, "where": f"{RULES[rule]}, {level} %", **cells})

    lines = [(rule, level) for rule in RULES for level in LEVELS]
    for rule, level in lines:
        cell = study.trained(rule, level, s2s, study.steps)
        row("recovery on text", rule, level, (cell, "_untuned"), (cell, "_recovered"))
    for rule, level in lines:
        cell = study.trained(rule, level, s2s, study.steps)
        row("fine-tuning on the task, after recovery", rule, level, (cell, "_recovered"), (cell, ""))
    for rule, level in lines:
        cell = study.trained(rule, level, s2s, 0)
        row("fine-tuning on the task, without recovery", rule, level, (cell, "_untuned"), (cell, ""))
    for rule, level in lines:
        plain, taught = (study.trained(rule, level, s2s, study.steps, teacher) for teacher in ("none", "dense"))
        row("a dense teacher in recovery", rule, level, (plain, "_recovered"), (taught, "_recovered"))
    for rule, level in lines:
        adapter, whole = (study.trained(rule, level, mode, study.steps) for mode in (s2s, full))
        row("all weights instead of adapters in recovery", rule, level, (adapter, "_recovered"), (whole, "_recovered"))
        row("fine-tuning all weights on the task, after recovery", rule, level, (whole, "_recovered"), (whole, ""))
    for rule, level in lines:
        sparse, dense = (study.trained(rule, level, mode, study.steps) for mode in (s2s, s2d))
        row("a dense instead of a sparse adapter", rule, level, (sparse, ""), (dense, ""))
        row("re-masking after the dense adapter", rule, level, (dense, ""), (dense, "_remasked"))
    return rows


def tuned(study: Study) -> list[dict[str, str]]:
    """Every model that was tuned: its scores, and the share that it keeps of the dense one's, tuned alike."""
    cells = study.cells[study.cells["mode"].isin([mode.name for mode in modes.MODES.values() if mode.trains])]
    rows = cells.to_dict("records")
    dense = next((score(row, "piqa") for row in rows if row["mode"] == modes.DENSE.name), None)
    found = []
    for row in rows:
        accuracy = score(row, "piqa")
        mode = modes.MODES[row["mode"]]
        steps = f"{row['cfg_recover_steps']:.0f}" + (", teacher" if row["cfg_teacher"] != "none" else "")
        share = f"{100 * accuracy.value / dense.value:.0f} %" if dense and accuracy else "–"
        found.append({
            "model": mode.label if mode == modes.DENSE else f"{RULES[row['series']]}, {mode.label}",
            "level": round(100 * row["sparsity"]), "recovery": steps, "perplexity": str(score(row, "perplexity")),
            "piqa": str(accuracy), "share": share,
        })  # fmt: skip
    return found


def smaller(study: Study) -> list[dict[str, str]]:
    """Structured and 2:4 models: scores, and of those that were measured, speed and bytes beside the dense one."""
    whole = study.found("unstructured magnitude", 0, modes.PRUNED.name)
    dense = next((row for row in whole if not pd.isna(row["measured_bytes"])), None)
    rows = []
    for series, label in OTHERS.items():
        for level in LEVELS:
            for row in study.found(series, level, modes.PRUNED.name):
                ratios = {}
                for name in ("measured_tokens_per_second", "measured_bytes"):
                    known = dense is not None and not pd.isna(row[name]) and not pd.isna(dense[name])
                    ratios[name] = f"{row[name] / dense[name]:.2f}" if known else "–"
                scores = {name: str(score(row, name) or "–") for name in ("perplexity", "piqa")}
                rows.append({"kind": label, "level": level, **scores, **ratios})
    return rows


def seeds(study: Study) -> dict[str, Any] | None:
    """The line that was run with several seeds: what they range over."""
    for series in RULES:
        for level in LEVELS:
            rows = study.found(series, level, modes.PRUNED.name)
            rows = [row for row in rows if score(row, "perplexity")]
            if len({row["seed"] for row in rows}) > 1:
                ppl, acc = ([score(row, name) for row in rows] for name in ("perplexity", "piqa"))
                shares = [", ".join(shown(one.value, one.form) for one in found if one) for found in (ppl, acc)]
                return {"rule": RULES[series], "level": level, "n": len(rows), "perplexity": shares[0],
                        "piqa": shares[1], "error": str(ppl[0])}  # fmt: skip
    return None


def missing(study: Study) -> list[str]:
    """What the question asks for and the study did not run, in words."""
    found = []
    for series, rule in RULES.items():
        levels = [level for level in LEVELS if study.pruned(series, level, "perplexity") is None]
        if levels:
            found.append(f"{rule}, pruned: {', '.join(map(str, levels))} %")
    for mode in (modes.SPARSE_TO_SPARSE, modes.SPARSE_TO_DENSE, modes.FULL):
        levels = sorted(
            {int(level) for level in (100 * study.cells[study.cells["mode"] == mode.name]["sparsity"]).round()}
        )
        found.append(f"{mode.label}: levels other than {', '.join(map(str, levels))} %" if levels else mode.label)
    found += [label for series, label in OTHERS.items() if not (study.cells["series"] == series).any()]
    return found


def page(folder: Path) -> str:
    """The page in Markdown."""
    study = Study(folder)
    cell, piqa = study.config["cell"], study.facts["tasks"]["piqa"]
    scored = {series: [study.pruned(series, level, "perplexity") for level in LEVELS] for series in RULES}
    accuracy = {series: [study.pruned(series, level, "piqa") for level in LEVELS] for series in RULES}
    second = [(RULES[series], level, found) for series in RULES for level in LEVELS
              if (found := study.pruned(series, level, "hellaswag"))]  # fmt: skip
    environment = Environment(loader=FileSystemLoader(DOCS), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters["number"] = lambda found: "–" if found is None else shown(found.value, found.form)
    text = environment.get_template("answer.md.jinja").render(
        study=study, facts=study.facts, cell=cell, levels=LEVELS, rules=RULES, share=f"{100 * SHARE:.0f}", sure=SURE,
        perplexities=scored, accuracies=accuracy, dense=study.dense("perplexity"), dense_piqa=study.dense("piqa"),
        questions=int(piqa["samples"]), chance=float(piqa["chance"]), second=second,
        dense_second=study.pruned("unstructured magnitude", 0, "hellaswag"),
        second_facts=study.facts["tasks"]["hellaswag"], kept=[kept(study, series, "piqa") for series in RULES],
        near={RULES[series]: within(study, series, 1.1) for series in RULES},
        double={RULES[series]: within(study, series, 2.0) for series in RULES}, added=added(study), tuned=tuned(study),
        lead=lead(study),
        smaller=smaller(study), seeds=seeds(study), missing=missing(study), finished=len(study.cells),
        violations=int(study.cells["sparsity_violations"].fillna(0).sum()),
        command=CONFIG.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "),
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text)


def figure(folder: Path) -> Figure:
    """Perplexity and accuracy against sparsity: a line a rule, the dense model as a rule."""
    study = Study(folder)
    with drawing():
        drawn = Figure(figsize=(9.0, 4.0), layout="constrained")
        left, right = drawn.subplots(1, 2)
        for number, (series, label) in enumerate(RULES.items()):
            for axes, name in ((left, "perplexity"), (right, "piqa")):
                points = [(level, found) for level in LEVELS if (found := study.pruned(series, level, name))]
                if points:
                    # A line that begins far from 0 % says nothing of what is between.
                    points = [(0, study.dense(name)), *points] if points[0][0] <= 30 else points
                    axes.plot([x for x, _ in points], [found.value for _, found in points], color=COLOURS[number],
                              marker="os^DX"[number], label=label)  # fmt: skip
        for number, series in enumerate(RULES):
            for axes, name in ((left, "perplexity"), (right, "piqa")):
                cells = [
                    (level, study.trained(series, level, modes.SPARSE_TO_SPARSE.name, study.steps)) for level in LEVELS
                ]
                points = [(level, found) for level, row in cells if (found := score(row, name))]
                if points:
                    axes.plot([x for x, _ in points], [found.value for _, found in points], color=COLOURS[number],
                              marker="os^DX"[number], linestyle=(0, (4, 2)), markerfacecolor="white", markersize=7,
                              label=f"{RULES[series]} + recovery")  # fmt: skip
        dense = study.dense("piqa")
        left.axhline(study.dense("perplexity").value, color=DENSE, linewidth=1, label="dense")
        right.axhline(dense.value, color=DENSE, linewidth=1)
        right.axhspan(dense.value - dense.error, dense.value + dense.error, color=DENSE, alpha=0.1, linewidth=0)
        right.axhline(float(study.facts["tasks"]["piqa"]["chance"]), color=RULE, linestyle=":", linewidth=1.2)
        chance = float(study.facts["tasks"]["piqa"]["chance"])
        right.annotate("guessing", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=RULE)
        left.set(
            yscale="log",
            ylim=(None, 1e5),
            ylabel="perplexity (log)",
            xlabel="sparsity, %",
            title="Perplexity of held-out text",
        )
        right.set(
            ylabel="accuracy", xlabel="sparsity, %", title=f"PIQA, {study.facts['tasks']['piqa']['samples']} questions"
        )
        handles, labels = left.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", metavar="RUN", help="id of the study's run")
    parser.add_argument("--busy", action="store_true", help="other programs used the machine meanwhile")
    options = parser.parse_args()
    folder = DOCS / "study"
    if options.export:
        export(options.export, options.busy, folder)
    (DOCS / "answer.md").write_text(page(folder), encoding="utf-8")
    with drawing():
        figure(folder).savefig(DOCS / "images" / "answer.png", dpi=150)


if __name__ == "__main__":
    main()
