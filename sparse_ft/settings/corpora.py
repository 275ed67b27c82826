"""The running texts that have a name, for calibration and perplexity: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CORPORA", "TASK", "Corpus", "corpus_problem", "corpus_words"]

TASK = "task"  # the texts of the cell's own task


@dataclass(frozen=True)
class Corpus:
    """A running text.

    Attributes:
        name: as flags and files spell it; files of it are ``data_dir/corpora/NAME.{jsonl,txt}``, and
            ``NAME.HELD_OUT.{jsonl,txt}``.
        title: of the held-out part, in protocols.
        repository, configuration: on the hub.
        train_files, held_out_files: in the repository, where a configuration would fetch far more; None: all of it.
        held_out: the split that perplexity is measured on.
        joined: calibration windows are drawn from all rows as one text, joined by spaces, and not each from a row.
        rows: of the held-out split that are read, joined by spaces; None: all, joined by blank lines.
        train: the split, or its part, that is drawn from.
        held_out_part: of ``train``, where the hub has no split for it.
    """

    name: str
    title: str
    repository: str
    configuration: str | None
    held_out: str
    joined: bool
    train_files: str | None = None
    held_out_files: str | None = None
    rows: int | None = None
    train: str = "train"
    held_out_part: str | None = None


# The first two as the code of Wanda and SparseGPT reads them (lib/data.py, datautils.py): which files, and how they are
# joined.
CORPORA = {
    row.name: row
    for row in (
        Corpus("wikitext2", "wikitext-2-raw/test", "Salesforce/wikitext", "wikitext-2-raw-v1", "test", joined=True),
        Corpus(
            "c4",
            "c4/validation",
            "allenai/c4",
            None,
            "validation",
            joined=False,
            train_files="en/c4-train.00000-of-01024.json.gz",
            held_out_files="en/c4-validation.00000-of-00008.json.gz",
            rows=1100,
        ),
        Corpus(
            "fineweb_edu",
            "fineweb-edu/sample-10BT, file 0, rows 100,000 to 101,099",
            "HuggingFaceFW/fineweb-edu",
            None,
            "held_out",
            joined=False,
            train_files="sample/10BT/000_00000.parquet",
            held_out_files="sample/10BT/000_00000.parquet",
            rows=1100,
            train="train[:100000]",
            held_out_part="train[100000:101100]",
        ),
    )
}


def corpus_words() -> tuple[str, ...]:
    """What a field that names a corpus may hold beside the path of a file."""
    return TASK, *CORPORA


def corpus_problem(field: str, corpus: str) -> str | None:
    """Why a field's value names no corpus; None where it does."""
    if corpus in corpus_words() or Path(corpus).expanduser().is_file():
        return None
    return f"{field} is '{corpus}'; there is no such file. Give {', '.join(corpus_words())} or a text file."
