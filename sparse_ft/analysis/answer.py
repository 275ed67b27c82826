"""A study of one model in a sentence for the terminal, and whether its accuracies can carry one. All of it computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparse_ft.analysis.numbers import shown_with_error
from sparse_ft.analysis.performance import chance_level, dense_baseline, majority_level
from sparse_ft.analysis.sentences import TASK_NAMES
from sparse_ft.settings.modes import DENSE, MODES, is_tuned

__all__ = ["ENOUGH", "Score", "Signal", "one_sentence", "signals"]

ENOUGH = 4.0  # standard errors above guessing, from which on an accuracy can tell levels apart
_CLEAR = 2.0  # standard errors between two scores that are called different


@dataclass(frozen=True)
class Score:
    """A score and its standard error; NaN for what was not measured."""

    value: float
    error: float

    def apart(self, other: Score) -> float:
        """How far this one is above the other, in standard errors of the difference; both taken as independent."""
        error = math.hypot(self.error, other.error)
        return (self.value - other.value) / error if error > 0 else math.nan


@dataclass(frozen=True)
class Signal:
    """How far the dense model, as it is, stands above guessing at a task.

    Attributes:
        task: the task.
        asked: which questions: how many, and of which split.
        dense: the dense model's accuracy.
        guess: that of guessing, or of always giving the commonest answer, whichever is higher.
        name: of the guess.
    """

    task: str
    asked: str
    dense: Score
    guess: float
    name: str

    @property
    def errors(self) -> float:
        """Standard errors above the guess."""
        return self.dense.apart(Score(self.guess, 0.0))

    def __str__(self) -> str:
        where = "above" if self.errors >= 0 else "below"
        so = (
            "so accuracy on it can tell models apart" if self.errors >= ENOUGH else "so accuracy on it says little here"
        )
        return (
            f"{TASK_NAMES.get(self.task, self.task)}{self.asked}: the dense model ({_text(self.dense, '.3f')}) is"
            f" {abs(self.errors):.1f} standard errors {where} {self.name} ({self.guess:.3f}), {so}."
        )


def signals(cells: pd.DataFrame, points: pd.DataFrame) -> Iterator[Signal]:
    """For each task of one model, how far the dense model stands above guessing; none where one of both is not known.

    Args:
        cells: from `cell_table`, or `sparse_ft.analysis.beside.beside_cells`.
        points: their performance table.
    """
    for model, task in cells[["model", "task"]].drop_duplicates().itertuples(index=False, name=None):
        own = cells[(cells["model"] == model) & (cells["task"] == task)]
        guesses = [
            (chance_level(own, task), "guessing"),
            (majority_level(own, task), "always giving the commonest answer"),
        ]
        known = [(height, name) for height, name in guesses if height is not None]
        dense = _dense(points, model, task, "accuracy", tuned=False)
        if known and dense.error > 0:
            yield Signal(task, _asked(own), dense, *max(known))


def one_sentence(cells: pd.DataFrame, points: pd.DataFrame, readable: pd.DataFrame) -> str:
    """What a study of one model and task says, at the highest level that was measured; empty where there is nothing.

    What is closer than two standard errors is not called different.

    Args:
        cells: from `cell_table`.
        points: their performance table.
        readable: points of the tasks whose accuracy can tell models apart.
    """
    pruned = points[(points["sparsity"] > 0) & points["perplexity"].notna()]
    if pruned.empty or len(points[["model", "task"]].drop_duplicates()) != 1 or points["variant"].nunique() != 1:
        return ""
    model, task = points[["model", "task"]].iloc[0]
    level = pruned["sparsity_percent"].max()
    # The method is named where there are several, as in the table.
    alone = pruned["method"].nunique() == 1
    named = pruned.assign(rule=[_rule(row, alone) for row in pruned.to_dict("records")])
    dense = _dense(points, model, task, "perplexity", tuned=False)
    parts = [_rules(named[named["sparsity_percent"] == level], dense)]
    kept = [mode.name for mode in MODES.values() if mode.keeps_zeros and mode.trains]
    trained = named[named["mode"].isin(kept)]
    if len(trained):
        best = trained[trained["sparsity"] == trained["sparsity"].max()].sort_values("perplexity").iloc[0]
        same = (cells[name] == best[name] for name in ("series", "mode", "sparsity"))
        parts.append(_training(best, cells[pd.concat(same, axis=1).all(axis=1)], level))
        parts += [_accuracy(readable, best, task) for task in readable["task"].drop_duplicates()]
    said = "; ".join(part for part in parts if part)
    return f"At {level:g} % sparsity {said}." if said else ""


def _rule(row: dict[str, Any], alone: bool) -> str:
    return row["series"].removeprefix(f"{row['method']} ") if alone else row["series"]


def _rules(level: pd.DataFrame, dense: Score) -> str:
    """What the choice of the rule is worth before anything is trained."""
    found: dict[str, Score] = {}
    for row in level.to_dict("records"):
        end = "_untuned" if is_tuned(row["mode"]) else ""
        score = Score(row[f"perplexity{end}"], row[f"perplexity_error{end}"])
        if not math.isnan(score.value):
            found[row["rule"]] = score
    ranked = sorted(found.items(), key=lambda item: item[1].value)
    if not ranked:
        return ""
    beside = "" if math.isnan(dense.value) else f" (dense {_text(dense)})"
    (first, low), (last, high) = ranked[0], ranked[-1]
    if len(ranked) == 1:
        return f"perplexity is {_text(low)} with {first}{beside}"
    said = f"perplexity is {_text(low)} with {first} and {_text(high)} with {last}{beside}"
    return f"the rule decides: {said}" if high.apart(low) > _CLEAR else f"the rules cannot be told apart: {said}"


def _training(row: pd.Series, cells: pd.DataFrame, level: float) -> str:
    """What training made of it, and whether its zeros are still there."""
    before, after = (Score(row[f"perplexity{s}"], row[f"perplexity_error{s}"]) for s in ("_untuned", ""))
    what = "fine-tuning" if math.isnan(row["perplexity_recovered"]) else "recovery with fine-tuning"
    lost = cells["sparsity_violations"].sum()
    zeros = "with every zero kept" if lost == 0 else f"with {lost:,.0f} zeros lost"
    where = "" if row["sparsity_percent"] == level else f" at {row['sparsity_percent']:g} %"
    if math.isnan(before.value):
        return f"{what} of {row['rule']}{where} ends at {_text(after)}, {zeros}"
    far = before.apart(after)
    verb = "raises" if far < 0 else "lowers"
    close = "" if abs(far) > _CLEAR else f", {abs(far):.1f} standard errors if the two are taken as independent"
    return f"{what} {verb} {row['rule']}{where} from {_text(before)} to {_text(after)}{close}, {zeros}"


def _accuracy(points: pd.DataFrame, best: pd.Series, task: str) -> str:
    """Accuracy of the cell beside that of the dense fine-tuned model, or of the dense one as it is."""
    own = points[points["task"] == task]
    same = own[
        (own["series"] == best["series"]) & (own["mode"] == best["mode"]) & (own["sparsity"] == best["sparsity"])
    ]
    dense, name = _dense(points, best["model"], task, "accuracy", tuned=True), f"{DENSE.label} fine-tuned"
    if math.isnan(dense.value):
        dense, name = _dense(points, best["model"], task, "accuracy", tuned=False), f"of the {DENSE.label} model"
    if same.empty or math.isnan(dense.value):
        return ""
    here = Score(same["accuracy"].iloc[0], same["accuracy_error"].iloc[0])
    far = here.apart(dense)
    said = f"accuracy on {TASK_NAMES.get(task, task)} is {_text(here, '.3f')} against {_text(dense, '.3f')} {name}"
    if abs(far) <= _CLEAR:
        return f"{said}, which is no difference ({abs(far):.1f} standard errors)"
    return f"{said}, {abs(far):.1f} standard errors {'more' if far > 0 else 'less'}"


def _dense(points: pd.DataFrame, model: str, task: str, name: str, tuned: bool) -> Score:
    """A score of the dense model, fine-tuned or as it is: of its own cell, or of the fine-tuned one before that."""
    base = dense_baseline(points, model, task, tuned=tuned)
    if base is not None:
        return Score(base[name], base[f"{name}_error"])
    base = None if tuned else dense_baseline(points, model, task)
    return Score(math.nan, math.nan) if base is None else Score(base[f"{name}_untuned"], base[f"{name}_error_untuned"])


def _asked(cells: pd.DataFrame) -> str:
    """``" (300 questions of validation)"``, where the cells agree."""
    said = {}
    for name in ("samples", "split"):
        values = cells[f"protocol_{name}"].dropna().unique() if f"protocol_{name}" in cells else []
        said[name] = str(values[0]) if len(values) == 1 else ""
    return f" (the first {said['samples']} questions of {said['split']})" if all(said.values()) else ""


def _text(score: Score, form: str = ",.3g") -> str:
    return shown_with_error(score.value, score.error, form)
