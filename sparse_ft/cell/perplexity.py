"""What perplexity is measured on where nobody says so: the text of the papers where it can be had, else the task's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.models.catalog import locate_config
from sparse_ft.models.devices import resolve_device
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.scoring import PUBLISHED, TASK_TEXT
from sparse_ft.tasks.corpora import can_be_had

__all__ = ["usual_perplexity"]

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # as families spell it


def usual_perplexity(cells: Iterable[CellConfig]) -> dict[str, Any]:
    """The fields that say how perplexity is measured, the same for all of these cells.

    As in the tables of GPTQ, SparseGPT and Wanda (wikitext-2 in windows of 2048) where every cell can have it so: the
    text lies in its ``data_dir/corpora``, or the hub is in reach, and no model reads less. On a CPU it is the first
    windows of that text, 16,384 tokens. Otherwise the text of the cell's own task, as ever.
    """
    cells = list(cells)
    corpus, window = PUBLISHED["perplexity_corpus"], PUBLISHED["perplexity_seq_len"]
    if not all(can_be_had(corpus, folder) for folder in dict.fromkeys(cell.data_dir for cell in cells)):
        return dict(TASK_TEXT)
    if not all(_reads(model, window) for model in dict.fromkeys(cell.model for cell in cells)):
        return dict(TASK_TEXT)
    if any(_is_cpu(device) for device in dict.fromkeys(cell.device for cell in cells)):
        return PUBLISHED | {"perplexity_tokens": TASK_TEXT["perplexity_tokens"]}
    return dict(PUBLISHED)


def _reads(model: str, tokens: int) -> bool:
    """Whether a model reads so many; one that cannot be had is complained of elsewhere."""
    try:
        said = json.loads(locate_config(model).read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return True
    found = [part[name] for part in (said, said.get("text_config") or {}) for name in _CONTEXT if part.get(name)]
    return not found or max(found) >= tokens


def _is_cpu(device: str) -> bool:
    try:
        return device == "cpu" or resolve_device(device).type == "cpu"
    except UserError:  # complained of elsewhere
        return False
