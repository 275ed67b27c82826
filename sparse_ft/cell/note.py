"""A cell's note: one sentence, and the numbers."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_ft.cell.result import CellResult
from sparse_ft.levels import level_label
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.tracking.notes import command_block, markdown_table
from sparse_ft.tracking.record import Tag

__all__ = ["cell_note"]

_SCORES = {"accuracy": ".3f", "loss": ".4f", "perplexity": ",.4g"}


def cell_note(cell: CellConfig, result: CellResult, command: str | None) -> str:
    """Markdown: what was made, what came out, in each stage that was scored, and how to do it again."""
    metrics, mode = result.metrics, MODES[cell.mode]
    stages = {"pruned": "_untuned", "recovered": "_recovered", "tuned": "", "masked again": "_remasked"}
    if not mode.trains:
        stages = {"pruned" if cell.pruned else "not pruned": ""}
    elif not cell.pruned:
        stages = {"untuned": "_untuned", "tuned": ""}
    rows = [
        [stage, *(_number(metrics, f"eval/{name}{suffix}", f"eval/{name}_stderr{suffix}", form)
                  for name, form in _SCORES.items())]
        for stage, suffix in stages.items()
        if any(f"eval/{name}{suffix}" in metrics for name in _SCORES)
    ]  # fmt: skip
    parts = [_sentence(cell, metrics), markdown_table(["model", *_SCORES], rows)]
    if warning := result.tags.get(Tag.WARNING):
        parts.append(f"**Warning**: {warning}")
    return "\n\n".join([*parts, *([command_block(command)] if command else [])])


def _sentence(cell: CellConfig, metrics: Mapping[str, float]) -> str:
    made = f"{cell.title}: the model was"
    if cell.pruned:
        after = metrics.get("sparsity/after_merge")
        made += f" pruned to {level_label(metrics.get('sparsity/achieved', cell.sparsity))} %"
        made += " and" if MODES[cell.mode].trains else ""
    made += f" fine-tuned on {cell.task} for {cell.max_steps} steps" if MODES[cell.mode].trains else ""
    made += " loaded as it is" if not cell.pruned and not MODES[cell.mode].trains else ""
    made += f"; accuracy {metrics['eval/accuracy']:.3f}" if "eval/accuracy" in metrics else ""
    if not cell.pruned:
        return f"{made}."
    broken = metrics.get("sparsity/violations")
    proof = "" if broken is None else f", {broken:,.0f} masked weights are not zero"
    return f"{made}; after the merge {'–' if after is None else f'{100 * after:.4g}'} % of the weights are zero{proof}."


def _number(metrics: Mapping[str, float], name: str, error: str, form: str) -> str:
    if name not in metrics:
        return "–"
    noise = f" ± {metrics[error]:{form}}" if error in metrics else ""
    return f"{metrics[name]:{form}}{noise}"
