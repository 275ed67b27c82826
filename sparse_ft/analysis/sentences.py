"""The answer in words, computed: how sparse a model can be and still keep its dense fine-tuned accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sparse_ft.analysis.panels import short_names
from sparse_ft.analysis.performance import chance_level, dense_baseline, majority_level
from sparse_ft.analysis.table import MEAN
from sparse_ft.settings.modes import DENSE, FULL, PRUNED, SPARSE_TO_DENSE, SPARSE_TO_SPARSE, is_tuned

__all__ = ["Sentence", "answers", "kept_level"]

TASK_NAMES = {"boolq": "BoolQ", "hellaswag": "HellaSwag", "gsm8k": "GSM8K", "arc_easy": "ARC-Easy",
              "arc_challenge": "ARC-Challenge", "piqa": "PIQA", "winogrande": "WinoGrande",
              "openbookqa": "OpenBookQA", "mmlu": "MMLU", MEAN: "The mean over the other tasks scored"}  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """What the study says about one model on one task."""

    model: str
    task: str
    text: str


def answers(cells: pd.DataFrame, table: pd.DataFrame, share: float = 0.95) -> list[Sentence]:
    """For each model and task: up to which sparsity ``share`` of the dense fine-tuned accuracy is kept.

    ``cells`` from `cell_table`, ``table`` from `performance_table`. Where the study cannot say (no
    baseline, no score, a baseline that is not above guessing), the sentence says that.
    """
    pairs = cells[["model", "task"]].drop_duplicates().itertuples(index=False, name=None)
    names = short_names(cells["model"].drop_duplicates().tolist())
    return [Sentence(model, task, _answer(cells, table, model, task, names[model], share)) for model, task in pairs]


def kept_level(line: pd.DataFrame, share: float) -> tuple[float | None, float | None]:
    """``(kept, lost)``: the highest measured level up to which recovery holds, and the first at which it does not.

    ``kept`` is None if the lowest measured level has lost it already, ``lost`` if none has. Levels are in
    percent; 0 % counts, but a line measured at 0 % alone keeps nothing.
    """
    kept = None
    known = line[line["recovery"].notna()].sort_values("sparsity_percent")
    for percent, recovery in zip(known["sparsity_percent"], known["recovery"], strict=True):
        if recovery < share:
            return kept, float(percent)
        kept = float(percent) if percent > 0 else kept
    return kept, None


def _answer(cells: pd.DataFrame, table: pd.DataFrame, model: str, task: str, name: str, share: float) -> str:
    subject = f"{TASK_NAMES.get(task, task)} on {name}"
    own = cells[(cells["model"] == model) & (cells["task"] == task)]
    here = table[(table["model"] == model) & (table["task"] == task)]
    tuned = bool(here.loc[here["accuracy"].notna(), "mode"].map(is_tuned).any())
    here = here[here["mode"].map(is_tuned) == tuned]  # what is not fine-tuned stands beside, and answers if alone
    scored, dense = here[here["accuracy"].notna()], f"{DENSE.label} fine-tuned" if tuned else DENSE.label
    if scored.empty:
        done = int((own["status"] == "FINISHED").sum())
        said = f"{subject}: no cell has a score of a tuned model ({done} of {len(own)} finished)."
        return " ".join([said, *_warnings(own)])
    if scored["variant"].nunique() > 1:
        return _best_of(subject, scored)
    parts = []
    base = dense_baseline(table, model, task, scored["variant"].iloc[0], tuned)
    if base is None:
        parts.append(f"{subject} has no {dense} baseline, so what sparsity costs is not known.")
    elif (guess := _guess(own, task)) and base["accuracy"] - guess[0] < 2 * _known(base["accuracy_error"]):
        parts.append(
            f"{subject}: accuracy cannot tell the levels apart, because"
            f" {'dense fine-tuning' if tuned else 'the dense model'} itself "
            f"({_score(base)}) is not clearly above {guess[1]} ({guess[0]:.3f}); read loss and perplexity instead."
        )
    elif not (compared := scored[scored["mode"] != DENSE.name])["recovery"].notna().any() and len(compared):
        reasons = compared["recovery_reason"].drop_duplicates().tolist()
        parts.append(f"{subject}: what sparsity costs is not known, because {' and '.join(reasons)}.")
    else:
        parts.append(_kept_sentence(subject, own, here, base, share, dense))
    parts += [text for text in (_rules_sentence(here, base), _perplexity_sentence(here, base)) if text]
    parts += _warnings(own)
    missing = int((own["status"] != "FINISHED").sum())
    if missing:
        parts.append(f"{missing} of its {len(own)} cells {'has' if missing == 1 else 'have'} no result.")
    return " ".join(parts)


def _warnings(own: pd.DataFrame) -> list[str]:
    """How many cells lost more than their error in the merge, or trained nothing."""
    said = own["warning"].fillna("") if "warning" in own else pd.Series(dtype=str)
    kinds = {
        "merge_cost": "the merge raises the loss on the answers by more than one standard error",
        "no_weight_moved": "training moved no weight, so that they are not tuned at all",
    }
    counts = {text: int(said.str.contains(f"{kind}: ", regex=False).sum()) for kind, text in kinds.items()}
    return [f"In {count} of its {len(own)} cells {text}." for text, count in counts.items() if count]


def _kept_sentence(
    subject: str, own: pd.DataFrame, here: pd.DataFrame, base: pd.Series, share: float, dense: str
) -> str:
    clauses = []
    pruned = here[here["mode"] != DENSE.name]
    for mode in (SPARSE_TO_SPARSE, SPARSE_TO_DENSE, FULL, PRUNED):
        lines = pruned[pruned["mode"] == mode.name]
        levels = [
            level
            for series in lines["series"].drop_duplicates()
            if (level := _level(series, lines[lines["series"] == series], own[own["mode"] == mode.name], share))
        ]
        held, lost = ([text for holds, text in levels if holds is kind] for kind in (True, False))
        parts = [f"up to {_listed(held)}"] if held else []
        parts += [f"{'but ' if held else ''}at no level of {_listed(lost)}"] if lost else []
        if parts:
            clauses.append(f"{', '.join(parts)}, {mode.sentence}")
    if not clauses:
        return f"{subject}: the {dense} model reaches {_score(base)}; no pruned cell has a score to compare."
    error = pruned["recovery_error"].max()
    noise = f" One standard error of that share is up to {100 * error:.1f} points." if error > 0 else ""
    return f"{subject} keeps {100 * share:g} % of {dense} accuracy ({_score(base)}) {'; '.join(clauses)}.{noise}"


def _level(series: str, line: pd.DataFrame, own: pd.DataFrame, share: float) -> tuple[bool, str] | None:
    """Whether the line keeps its accuracy anywhere, and how far; None where it was not measured."""
    kept, lost = kept_level(line, share)
    measured = line.loc[line["recovery"].notna() & (line["sparsity"] > 0), "sparsity_percent"]
    if measured.empty:
        return None
    method = line["method"].iloc[0]
    # The importance is named only where the method comes with several.
    alone = own.loc[own["method"] == method, "series"].nunique() == 1
    name = method if alone else series
    if kept is None:
        return False, f"{name} (the lowest measured is {measured.min():g} %)"
    text = f"{kept:g} % {name}"
    levels = (own.loc[own["series"] == series, "sparsity"] * 100).round(6)
    silent = sorted(set(levels[levels > kept]) - set(measured))
    if lost is None and not silent:
        return True, f"{text} (the highest measured)"
    between = [f"{level:g} %" for level in silent if lost is None or level < lost]
    return True, f"{text} ({_listed(between)} without a score)" if between else text


def _rules_sentence(here: pd.DataFrame, base: pd.Series | None) -> str:
    """What the choice of the rule is worth before tuning, at the highest level where there is a choice."""
    before = here["perplexity_untuned"].where(here["mode"].map(is_tuned), here["perplexity"])
    known = here.assign(before=before)[before.notna() & (here["sparsity"] > 0)]
    choices = known.groupby("sparsity_percent")["series"].nunique()
    if not (choices > 1).any():
        return ""
    level = choices[choices > 1].index.max()
    points = known[known["sparsity_percent"] == level].sort_values("before", kind="stable")
    best, worst = points.iloc[0], points.iloc[-1]
    column = "perplexity" + ("_untuned" if base is not None and is_tuned(base["mode"]) else "")
    dense = f" (dense: {_plain(base[column])})" if base is not None and base[column] > 0 else ""
    return (
        f"At {level:g} % the perplexity before fine-tuning is {_plain(best['before'])} with {best['series']}, and"
        f" {_plain(worst['before'])} with {worst['series']}{dense}."
    )


def _perplexity_sentence(here: pd.DataFrame, base: pd.Series | None) -> str:
    """The line that was pruned hardest, of several the best one, before and after tuning, beside dense."""
    shown = (SPARSE_TO_SPARSE.name, PRUNED.name)
    known = here[here["mode"].isin(shown) & (here["sparsity"] > 0) & here["perplexity"].notna()]
    if known.empty:
        return ""
    hardest = known[known["sparsity"] == known["sparsity"].max()]
    point = hardest.loc[hardest["perplexity"].idxmin()]
    before, after = _plain(point["perplexity_untuned"]), _plain(point["perplexity"])
    dense = f" (dense: {_plain(base['perplexity'])})" if base is not None and base["perplexity"] > 0 else ""
    level = f"{point['sparsity_percent']:g} % {point['series']}"
    if point["mode"] == PRUNED.name:
        return f"At {level}, not fine-tuned, perplexity is {after}{dense}."
    said = f"{level}, sparse to sparse fine-tuning"
    if before == after:
        return f"At {said} leaves perplexity at {after}{dense}."
    return f"At {said} brings perplexity {f'from {before} ' if before else ''}to {after}{dense}."


def _best_of(subject: str, scored: pd.DataFrame) -> str:
    best = scored.loc[scored["accuracy"].idxmax()]
    return (
        f"{subject} was tried in {scored['variant'].nunique()} configurations; the most accurate "
        f"({_score(best)}) is {best['series']} at {100 * best['sparsity']:g} % with {best['variant']}. "
        "Being chosen by this very score, it flatters itself."
    )


def _guess(own: pd.DataFrame, task: str) -> tuple[float, str] | None:
    levels = [(chance_level(own, task), "chance"), (majority_level(own, task), "always giving the commonest answer")]
    known = [(height, name) for height, name in levels if height is not None]
    return max(known) if known else None


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error


def _score(point: pd.Series) -> str:
    error = point["accuracy_error"]
    return f"{point['accuracy']:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _plain(value: float) -> str:
    if math.isnan(value):
        return ""
    return "infinity" if math.isinf(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""
