"""The rows of a task in a folder of JSON lines, in the columns that lm-eval reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_path

__all__ = [
    "ADAPTED",
    "adapt_row",
    "json_lines",
    "line_number",
    "local_rows",
    "split_context",
    "truth",
    "write_rows",
]

_ENDINGS = ("endings", "label")
_FINAL_ANSWER = re.compile(r"#### -?[$]?[0-9.,]*[0-9]")  # what lm-eval compares; without it every answer is wrong
_TRUTH = {"true": 1, "false": 0, "yes": 1, "no": 0}

Row = dict[str, Any]


def local_rows(task: str, split: str, data_dir: str | Path) -> list[Row] | None:
    """Rows of ``data_dir/TASK/SPLIT.jsonl``, in the columns that lm-eval's definition of the task reads.

    Returns:
        One dict per line, in the file's order; None where there is no such file.

    Raises:
        UserError: ``data_dir`` is not a folder, or a line is not UTF-8 JSON, lacks a column, or has a value of another
            kind than the lines before; names file and line.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"data_dir {folder} is not a folder; it should hold {task}/{split}.jsonl "
            "(or use data_dir=packaged for BoolQ and PIQA, or none for the hub)"
        )
    path = folder / task / f"{split}.jsonl"
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; it should hold one JSON object a line")
    if not path.exists():
        return None
    rows: list[Row] = []
    kinds: dict[str, str] = {}
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        rows.append(adapt_row(task, row, where))
        for column, value in rows[-1].items():
            _agree(kinds, _kinds(value, column, where), where)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def line_number(path: Path, index: int) -> int:
    """The line of a file on which its row ``index`` (from 0) stands: blank lines are no rows."""
    return next(islice(json_lines(path), index, None))[0]


def adapt_row(task: str, row: Mapping[str, Any], where: str = "row") -> Row:
    """``row`` in the columns that lm-eval's own definition of ``task`` reads.

    ``boolq`` (hub: question, passage, answer) gets the SuperGLUE ``label`` 0 or 1; ``hellaswag`` gets
    ``ctx_a`` and ``ctx_b`` where it has ``ctx`` alone (see :func:`split_context`); rows of any other task
    pass unchanged. Columns that the definition does not read are left out for the first three.

    Raises:
        UserError: a column is missing or has a value that is no answer; names ``where``.
    """
    adapter = _ADAPTERS.get(task)
    return dict(row) if adapter is None else adapter(row, where)


def split_context(context: str) -> tuple[str, str]:
    """HellaSwag's ``ctx`` cut into ``ctx_a`` (whole sentences) and ``ctx_b`` (the begun last sentence).

    In the published data ``ctx`` is ``ctx_a + " " + ctx_b`` for the ActivityNet items and ``ctx_a`` alone
    for the WikiHow items; lm-eval capitalises ``ctx_b``. Copies of the data set that keep only ``ctx``
    have lost the seam. It is found again as the text after the last sentence end, if that text begins
    with a lower-case letter: an ActivityNet fragment does ("the man", "then, he"), a WikiHow sentence
    does not, and then ``ctx_b`` is empty and the prompt is ``ctx`` itself, as it is in lm-eval.
    """
    seams = list(re.finditer(r"[.!?][\"')\]]*\s+(?=\S)", context))
    if not seams:
        return context, ""
    cut = seams[-1].end()
    fragment = context[cut:]
    if not fragment[0].islower():
        return context, ""
    return context[:cut].rstrip(), fragment


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def json_lines(path: Path) -> Iterable[tuple[int, Row]]:
    """The objects of a file of JSON lines, each with the number of its line; blank lines are left out.

    Raises:
        UserError: a line is not UTF-8, not JSON, or no object; names file and line.
    """
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1 is UTF-16; save the file as UTF-8")
    # Only line ends split (\r, \n, both): a U+2028 inside a text does not.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON ({error.msg}); each line must be one object") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
        except UnicodeEncodeError as error:
            raise UserError(f"{path}:{number} has half a surrogate pair, which is no text; mend that line") from error
        except (ValueError, RecursionError) as error:  # NaN, an integer of 5,000 digits, brackets 10,000 deep
            raise UserError(f"{path}:{number} holds a value that cannot be read ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object; each line must be one")
        yield number, row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _kinds(value: Any, column: str, where: str) -> dict[str, str]:
    """The kind of every value in ``value`` by its column (``choices.text[]`` for the elements of a list).

    Raises:
        UserError: a list of several kinds or with a null in it, or an integer of more than 64 bits.
    """
    if value is None:
        return {}
    if isinstance(value, bool):
        return {column: "true or false"}
    if isinstance(value, (int, float)):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{where}: column {column!r} has an integer of more than 64 bits")
        return {column: "a number"}
    if isinstance(value, str):
        return {column: "text"}
    inside = {column: "an object" if isinstance(value, dict) else "a list"}
    if isinstance(value, dict):
        for name, part in value.items():
            inside |= _kinds(part, f"{column}.{name}", where)
        return inside
    for part in value:
        if part is None:
            raise UserError(f"{where}: column {column!r} has a null in its list")
        _agree(inside, _kinds(part, f"{column}[]", where), where)
    return inside


def _agree(known: dict[str, str], found: Mapping[str, str], where: str) -> None:
    for column, kind in found.items():
        if known.setdefault(column, kind) != kind:
            raise UserError(f"{where}: column {column!r} is {kind}; in the rows before it is {known[column]}")


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise UserError(f"{where} has no column {name!r}; it has {', '.join(sorted(row)) or 'none'}")
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = _column(row, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: column {name!r} is {json.dumps(value)[:40]}; text expected")
    return value


def truth(value: Any, where: str) -> int:
    """0 or 1 for a boolean, a 0 or 1, or the words true/false/yes/no in any case."""
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    if isinstance(value, (bool, int)) and value in (0, 1):
        return int(value)
    raise UserError(f"{where}: {value!r} is not an answer; true or false expected")


def _boolq(row: Mapping[str, Any], where: str) -> Row:
    answer = row["label"] if row.get("answer") is None and "label" in row else _column(row, "answer", where)
    question, passage = (_text(row, name, where) for name in ("question", "passage"))
    return {"question": question, "passage": passage, "label": truth(answer, where)}


def _hellaswag(row: Mapping[str, Any], where: str) -> Row:
    if row.get("ctx_a") is not None and row.get("ctx_b") is not None:
        ctx_a, ctx_b = (_text(row, name, where) for name in ("ctx_a", "ctx_b"))
    else:
        ctx_a, ctx_b = split_context(_text(row, "ctx", where))
    activity, endings, label = _text(row, "activity_label", where), *(_column(row, n, where) for n in _ENDINGS)
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise UserError(f"{where}: column 'endings' is {json.dumps(endings)[:40]}; a list of texts expected")
    if not str(label).isdecimal() or int(label) >= len(endings):
        raise UserError(f"{where}: label {label!r} does not name one of the endings")
    context = {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b}
    return {**context, "endings": endings, "label": str(label)}


def _gsm8k(row: Mapping[str, Any], where: str) -> Row:
    question, answer = (_text(row, name, where) for name in ("question", "answer"))
    if not _FINAL_ANSWER.search(answer):
        raise UserError(f"{where}: column 'answer' has no line '#### NUMBER', so no model can score above 0 on it")
    return {"question": question, "answer": answer}


_ADAPTERS: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "gsm8k": _gsm8k,
}
ADAPTED = frozenset(_ADAPTERS)
"""Tasks whose rows are brought into lm-eval's columns, and whose answers are checked, as they are read."""
