"""Notes in Markdown, as MLflow's pages show them above a run: what all of them have in common."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CURVES_NOTE", "EXPERIMENT_NOTE", "OURS", "command_block", "markdown_table"]

OURS = "*Written by sparse_ft; a note without this line is left alone.*"

EXPERIMENT_NOTE = f"""Runs of sparse_ft: language models, pruned and fine-tuned.

- **What is a run.** The tag `kind` says it: a *study* has its *cells* (one model, task, method, sparsity, mode and seed
  each) and its *masks* below it; *curves* have an experiment of their own, *analysis* and *validation* stand alone.
- **Where the answer is.** In the note of a study's run, and on the page `report/report.html` among its artifacts.
- **How to read the table.** Filter `tags.kind = 'cell'`; columns `eval/accuracy`, `eval/perplexity`,
  `sparsity/achieved`, `sparsity/violations` (0, or something is broken), `failure_class`.
- **How to do it again.** Every run has the tag `command`.

{OURS}
"""


CURVES_NOTE = f"""Lines of the figures of sparse_ft's studies, a run each: open *Chart*, or select runs and *Compare*,
and take a metric against *Step*, which is the sparsity in percent, or in tenths of it where the tag `steps` says so.

{OURS}
"""


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns, so many, are words, and the others numbers."""
    rule = _row(["---"] * words + ["---:"] * (len(heads) - words), " | ")
    lines = [_row(heads), rule, *map(_row, rows)]
    return "\n".join(lines)


def command_block(command: str) -> str:
    """A command to copy."""
    return f"To do it again:\n\n```\n{command}\n```"


def _row(values: Sequence[str], between: str = "&nbsp;&nbsp; | ") -> str:
    """A line of a table; MLflow's pages put no room between columns, and cut off plain blanks."""
    return "| " + between.join(str(value).replace("|", "\\|").replace("\n", " ") for value in values) + " |"
