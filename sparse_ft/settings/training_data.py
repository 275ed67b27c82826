"""The parameters of what is trained on: which rows, what of them counts, and how they are put together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparse_ft.settings.corpora import TASK, corpus_words
from sparse_ft.settings.field import Settings, setting

__all__ = ["LOSS_ON", "SOURCES", "TrainingDataSettings", "hub_name", "source_problem"]

LOSS_ON = ("answer", "all")
SOURCES = ("train_data", "mixed_data")  # what identities call the rows of `TrainingDataSettings.sources`
FILES = (".jsonl", ".txt")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?")

_later = partial(setting, later=True)


@dataclass(frozen=True)
class TrainingDataSettings(Settings):
    """Which rows are trained on, and on which of their tokens the loss is taken."""

    train_data: str = _later(
        TASK,
        "rows to train on: task (its training split), a JSONL file or a folder of them, a text file, a hub data set"
        " (owner/name[:config][@revision]), or a corpus by name (wikitext2, c4,"
        " fineweb_edu). Their columns are text, prompt and completion, or messages.",
        path=corpus_words(),
        needed=True,
        named=True,
        behind="train_data",
    )
    loss_on: str = _later(
        "answer",
        "tokens that the loss is taken on: answer (the task's, the completion, or the assistant's turns), or all;"
        " of text all in either case.",
        choices=LOSS_ON,
        time=False,
    )

    packing: bool = _later(
        False,
        "fill sequences of max_seq_len with several rows, which do not see each other; text is cut where one is full.",
    )

    mix: str | None = _later(
        None,
        "a second source, as train_data's, mixed in; or none.",
        path=corpus_words(),
        needed=True,
        named=True,
        behind="mixed_data",
    )
    mix_weight: float = _later(0.2, "part of the sequences that come from the second source.", time=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """What is trained on, by name."""
        return (self.train_data,) if self.mix is None else (self.train_data, self.mix)

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        for field in ("train_data", "mix") if self.mix is not None else ("train_data",):
            if problem := source_problem(field, getattr(self, field)):
                yield problem
        if self.mix is not None and not 0 < self.mix_weight < 1:
            yield f"mix_weight is {self.mix_weight}; it must lie between 0 and 1."


def hub_name(source: str) -> tuple[str, str | None, str | None] | None:
    """Repository, configuration and revision of ``owner/name[:config][@revision]``; None: it names a file or a folder,
    which comes first where there is one of that name."""
    if source.startswith((".", "/", "~")) or source.endswith(FILES) or Path(source).exists():
        return None
    match = _HUB.fullmatch(source)
    return match.groups() if match else None


def source_problem(field: str, source: str) -> str | None:
    """Why a field's value names no rows; None where it does, or where only the hub knows."""
    if source in corpus_words() or hub_name(source):
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        return None if any(path.glob("*.jsonl")) else f"{field} is '{source}'; that folder has no JSONL file."
    if path.is_file():
        return None if path.suffix in FILES else f"{field} is '{source}'; a file of rows is .jsonl, one of text .txt."
    return (
        f"{field} is '{source}'; there is no such file or folder. Give one, a hub data set (owner/name), or"
        f" {', '.join(corpus_words())}."
    )
