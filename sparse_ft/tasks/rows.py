"""Rows to train on, from files, folders, the hub and corpora: which shape they have, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.settings.corpora import CORPORA
from sparse_ft.settings.training_data import hub_name, source_problem
from sparse_ft.tasks.corpora import training_rows
from sparse_ft.tasks.sources import json_lines

__all__ = ["COLUMNS", "MESSAGES", "PROMPTS", "SHAPES", "TEXT", "Rows", "read_rows"]

MESSAGES, PROMPTS, TEXT = "messages", "prompt + completion", "text"
# By what they are recognised, in this order; other columns are not looked at.
SHAPES = {MESSAGES: ("messages",), PROMPTS: ("prompt", "completion"), TEXT: ("text",)}
COLUMNS = {  # in the words of `sparse_ft.tracking.record.DataInput`
    MESSAGES: {"messages": [{"role": "string", "content": "string"}]},
    PROMPTS: {"prompt": "string", "completion": "string"},
    TEXT: {"text": "string"},
}


@dataclass(frozen=True)
class Rows:
    """What is trained on.

    Attributes:
        shape: a key of `SHAPES`.
        rows: with the columns of the shape, and perhaps others.
        where: names a row by its number from 0: ``rows.jsonl:7``.
        running: text that nobody made rows of for training: it is cut wherever a sequence is full.
    """

    shape: str
    rows: Sequence[Mapping[str, Any]]
    where: Callable[[int], str]
    running: bool = False

    @cached_property
    def digest(self) -> str:
        """The shape, and 16 hex digits: SHA-256 over its columns of all rows in their order, wherever they came from.

        Raises:
            UserError: a row that nothing can be learned from; names it.
        """
        found, check = hashlib.sha256(), _CHECKS[self.shape]
        for number, row in enumerate(self.rows):
            if problem := check(row):
                raise UserError(f"{self.where(number)} {problem}")
            content = [_plain(row[column]) for column in SHAPES[self.shape]]
            found.update(json.dumps(content, sort_keys=True).encode() + b"\n")
        return f"{self.shape} {found.hexdigest()[:16]}"


def read_rows(source: str, data_dir: str | None) -> Rows:
    """The rows that ``train_data`` names, all of them looked at.

    Args:
        source: a JSON lines file; a folder of such (those that begin with ``train``, where there are any); a text file;
            ``owner/name[:config][@revision]`` on the hub, its split ``train``; a row of `CORPORA`.
        data_dir: see `sparse_ft.tasks.corpora.training_rows`.

    Raises:
        UserError: no such source, columns of no shape, rows of another shape than the first, empty ones.
    """
    if problem := source_problem("train_data", source):
        raise UserError(problem)
    if source in CORPORA or source.endswith(".txt"):
        rows = _text(source, data_dir)
    elif hub := hub_name(source):
        rows = _hub(source, *hub)
    else:
        rows = _files(Path(source).expanduser())
    _ = rows.digest  # looks at every row
    return rows


def _text(source: str, data_dir: str | None) -> Rows:
    corpus = training_rows(source, data_dir)
    texts = ["".join(corpus.rows)] if corpus.joined else [text for text in corpus.rows if text.strip()]
    return Rows(TEXT, [{"text": text} for text in texts], lambda number: f"{source} row {number + 1}", running=True)


def _files(path: Path) -> Rows:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("train*.jsonl")) or sorted(path.glob("*.jsonl"))
    rows, places = [], []
    for file in files:
        try:
            for number, row in json_lines(file):
                rows.append(row)
                places.append((file, number))
        except OSError as error:
            raise UserError(f"cannot read the rows of {file}: {error}") from error

    def where(number: int) -> str:
        file, line = places[number]
        return f"{file}:{line}"

    return _shaped(rows, rows[0] if rows else (), where, str(path))


def _hub(source: str, repository: str, configuration: str | None, revision: str | None) -> Rows:
    import datasets

    from sparse_ft.tasks.finding import quiet

    try:
        with quiet():
            commit = _commit(repository, revision)
            rows = datasets.load_dataset(repository, configuration, split="train", revision=commit)
        # datasets names the folder of what it keeps by the commit, and takes what it has where it reaches no hub.
        if commit and not all(commit in file["filename"] for file in rows.cache_files):
            raise LookupError("what is in the cache is of another revision")
    except Exception as error:  # datasets raises half a dozen classes for "no network"
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UserError(
            f"cannot load the split train of {source} from the hub ({reason}); check name and network, or give a JSONL"
            " file"
        ) from error
    return _shaped(rows, rows.column_names, lambda number: f"{source} row {number + 1}", source)


def _commit(repository: str, revision: str | None) -> str | None:
    """The commit that a branch or a tag is now; one that is named by its 40 digits needs no network."""
    if revision is None or re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository, revision=revision).sha


def _shaped(rows: Sequence[Any], columns: Iterable[str], where: Callable[[int], str], source: str) -> Rows:
    """Rows with the shape that their columns, those of the first row, have."""
    if not len(rows):
        raise UserError(f"{source} has no rows")
    shape = next((name for name, needed in SHAPES.items() if set(needed) <= set(columns)), None)
    if shape is None:
        raise UserError(
            f"{where(0)} has the columns {', '.join(sorted(columns)) or 'none'}; rows to train on have text, prompt and"
            " completion, or messages"
        )
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns(list(SHAPES[shape]))
    return Rows(shape, rows, where)


def _plain(value: Any) -> Any:
    """A column's value, of messages role and content alone: the hub fills up what some rows have beside them."""
    if isinstance(value, str):
        return value
    return [[message["role"], message["content"]] for message in value]


def _check_text(row: Mapping[str, Any]) -> str | None:
    return _check_words(row, "text")


def _check_prompts(row: Mapping[str, Any]) -> str | None:
    return _check_words(row, "prompt") or _check_words(row, "completion")


def _check_words(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if column not in row:
        return f"has no column {column}, which the first row has"
    if not isinstance(value, str):
        return f"has {json.dumps(value, default=str)[:40]} in its column {column}; text is wanted"
    return None if value.strip() else f"has an empty {column}"


def _check_messages(row: Mapping[str, Any]) -> str | None:
    if "messages" not in row:
        return "has no column messages, which the first row has"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "has no messages; a list of {role, content} is wanted"
    for message in messages:
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            return f"has the message {json.dumps(message, default=str)[:40]}; role and content are texts"
    said = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    if not said or not all(said):
        return "has no turn of the assistant to learn from" if not said else "has an empty turn of the assistant"
    return "begins with the assistant, who answers nothing" if messages[0]["role"] == "assistant" else None


_CHECKS = {MESSAGES: _check_messages, PROMPTS: _check_prompts, TEXT: _check_text}
