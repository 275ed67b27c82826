"""Running text: corpora by name, from a folder or the hub, and files; windows drawn from it as the papers draw them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ft.errors import UserError
from sparse_ft.settings.corpora import CORPORA, Corpus

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CorpusRows",
    "can_be_had",
    "drawn_windows",
    "held_out_file",
    "held_out_rows",
    "training_file",
    "training_rows",
]

_SUFFIXES = (".jsonl", ".txt")
_TIMEOUT = 5.0  # seconds that a hub gets to answer
_LONG = 10_000_000  # characters of a text without a window, after which a draw gives up


@dataclass(frozen=True)
class CorpusRows:
    """What calibration draws from.

    Attributes:
        rows: of text.
        joined: they are one text, joined by spaces, and a window may go over their ends.
    """

    rows: Sequence[str]
    joined: bool

    @cached_property
    def digest(self) -> str:
        """16 hex digits: SHA-256 over the rows in their order, wherever they came from, and how they are drawn from."""
        identity = hashlib.sha256(b"joined" if self.joined else b"row by row")
        for row in self.rows:
            content = row.encode()
            identity.update(len(content).to_bytes(8, "little") + content)
        return identity.hexdigest()[:16]


def training_rows(corpus: str, data_dir: str | None) -> CorpusRows:
    """The rows that calibration draws from.

    Args:
        corpus: a row of `CORPORA`, or a UTF-8 file: JSON lines with a column ``text``, a row each, or plain text.
        data_dir: ``data_dir/corpora/NAME.jsonl`` (or ``.txt``, a row a line) comes before the hub.

    Raises:
        UserError: no such file, rows without text, or a hub that cannot be reached.
    """
    row, local = CORPORA.get(corpus), training_file(corpus, data_dir)
    if row is None:
        return CorpusRows(_read(local), local.suffix != ".jsonl")
    return CorpusRows(_read(local) if local else _hub(row, row.train, row.train_files), row.joined)


def training_file(corpus: str, data_dir: str | None) -> Path | None:
    """The file that `training_rows` reads; None: the hub's."""
    return _local(corpus, data_dir) if corpus in CORPORA else Path(corpus).expanduser()


def held_out_rows(corpus: str, data_dir: str | None) -> tuple[str, Iterable[str]]:
    """The name for the protocol, and the texts that perplexity reads, of a row of `CORPORA`.

    Raises:
        UserError: as `training_rows`.
    """
    row = CORPORA[corpus]
    local = held_out_file(corpus, data_dir)
    rows = _read(local) if local else _hub(row, row.held_out_part or row.held_out, row.held_out_files)
    return row.title, rows if row.rows is None else [" ".join(rows[: row.rows])]


def held_out_file(corpus: str, data_dir: str | None) -> Path | None:
    """The file that `held_out_rows` reads; None: the hub's."""
    row = CORPORA[corpus]
    return _local(f"{row.name}.{row.held_out}", data_dir)


def can_be_had(corpus: str, data_dir: str | None) -> bool:
    """Whether `held_out_rows` gives a row of `CORPORA` at once: it lies in the folder, or the hub is in reach."""
    from huggingface_hub import HfApi

    if held_out_file(corpus, data_dir) is not None:
        return True
    try:
        HfApi().dataset_info(CORPORA[corpus].repository, timeout=_TIMEOUT)
        held_out_rows(corpus, data_dir)
    except Exception:  # there are half a dozen classes for "no network"
        return False
    return True


def drawn_windows(
    corpus: CorpusRows, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Windows at random, with the very draws that Wanda's and SparseGPT's code makes with this seed: of the joined
    text; else each of a row drawn at random, of those longer than a window.

    Returns:
        token ids, int64 ``[samples, seq_len]``.

    Raises:
        UserError: too little text, or no row that is long enough.
    """
    import torch

    rows, dice = corpus.rows, random.Random(seed)
    if corpus.joined:
        whole = _ids(" ".join(rows), tokenizer)
        if len(whole) <= seq_len:
            raise UserError(f"the calibration text has {len(whole)} tokens; a window has {seq_len}. Give more text.")
        starts = [dice.randint(0, len(whole) - seq_len - 1) for _ in range(samples)]
        return torch.tensor([whole[start : start + seq_len] for start in starts], dtype=torch.int64)
    windows = []
    tried: set[int] = set()
    while len(windows) < samples:
        index = dice.randint(0, len(rows) - 1)
        ids = [] if index in tried else _ids(rows[index], tokenizer)
        if len(ids) <= seq_len:
            tried.add(index)
            if len(tried) == len(rows) or (not windows and sum(len(rows[i]) for i in tried) > _LONG):
                raise UserError(
                    f"no row of the calibration text is longer than {seq_len} tokens; lower calibration_seq_len"
                )
            continue
        start = dice.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
    return torch.tensor(windows, dtype=torch.int64)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _local(name: str, data_dir: str | None) -> Path | None:
    if data_dir is None:
        return None
    paths = [Path(data_dir).expanduser() / "corpora" / f"{name}{suffix}" for suffix in _SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path) -> list[str]:
    """The rows of a file: column ``text`` of JSON lines, else its lines with their ends."""
    try:
        with open(path, encoding="utf-8-sig") as text:
            lines = list(text)
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if path.suffix != ".jsonl":
        return lines
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}:{number} is no JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}:{number} has no text; write {{"text": "..."}}')
        rows.append(row["text"])
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _hub(row: Corpus, split: str, files: str | None) -> Sequence[str]:
    import datasets

    from sparse_ft.tasks.finding import quiet

    try:
        with quiet():
            chosen = {"name": row.configuration} if files is None else {"data_files": {split.partition("[")[0]: files}}
            rows = datasets.load_dataset(row.repository, split=split, **chosen)
    except Exception as error:  # datasets raises half a dozen classes for "no network"
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        place = row.name if split == row.train else f"{row.name}.{row.held_out}"
        raise UserError(
            f"cannot load {row.name} from the hub ({reason}); check the network, put it into"
            f" data_dir/corpora/{place}.jsonl, or name a text file or task"
        ) from error
    return rows["text"]
