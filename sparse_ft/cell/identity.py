"""What a cell's names stand for: weights, rows, precision, code. Keys are made of this, and results compared by it.

A name (of a model, a folder, a file, ``auto``) may mean something else tomorrow or on another machine; two names may
mean the same. Everything that is kept and found again, and everything that is averaged or divided, goes by what is
behind the names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sparse_ft
from sparse_ft.cell.teacher import teacher_fingerprint
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import ModelUnavailableError, UserError
from sparse_ft.models.devices import resolve_device, resolve_dtype
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.corpora import CORPORA, TASK, corpus_problem
from sparse_ft.settings.field import defaults, named, plain_values, unsaid
from sparse_ft.settings.lora import LoraSettings
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.recovery import RecoverySettings
from sparse_ft.settings.rules import AUTO
from sparse_ft.settings.scoring import ScoringSettings, scored_text
from sparse_ft.settings.training_data import SOURCES
from sparse_ft.tasks.corpora import held_out_file
from sparse_ft.tasks.rows import MESSAGES, TEXT

__all__ = [
    "IdentityError",
    "cell_identity",
    "cell_key",
    "check_identity",
    "digest",
    "mask_key",
    "plan_identity",
    "recovery_parts",
    "untuned_key",
    "versions",
]

_PLACE = ("dtype", "device")  # of whoever runs the cell, not of whoever plans it
_LATER = named(ScoringSettings, later=True)  # at their defaults they stand in no key
_LIBRARIES = ("torch", "transformers", "peft", "lm_eval")


class IdentityError(ModelUnavailableError):
    """What a name stands for here is not what it stood for where the study was planned."""


def cell_identity(cell: CellConfig, bench: Workbench, trainer: str = "local") -> dict[str, str]:
    """What a cell's names stand for on this machine, name -> digest or value.

    ``weights``, ``model_config`` and ``tokenizer`` of the base model; ``training_data`` (of the task), ``scored_data``
    and ``fewshot_data`` (where there are any); ``train_data`` (rows of one's own) and the ``chat_template`` that
    they are written with; ``score_data`` (of the tasks that are scored beside it); ``scored_template`` (the chat
    template that questions are put into); ``task_definition`` (of a task of one's own); ``num_fewshot``;
    ``perplexity_text`` (of a file); ``calibration_text`` and ``recovery_text`` (of a corpus); ``masks`` (of a given
    file); ``teacher`` (of one that is named); ``dtype`` and ``device`` as resolved; ``versions`` of this program and
    of the libraries that compute; ``trainer``, where it is not the local one.

    Raises:
        UserError: a model, a task, a mask file, a text or a teacher that cannot be had.
    """
    cell = cell.settled()
    task = bench.task(cell)
    device = resolve_device(cell.device)
    found = {**bench.model_digests(cell.model), **bench.data_digests(cell)}
    calibrated = cell.pruned and cell.needs_calibration and cell.masks is None
    sources = cell.sources if MODES[cell.mode].trains else ()
    texts = [*sources, *([cell.calibration_corpus] if calibrated else [])]
    if TASK not in [*texts, *([cell.recover_corpus] if cell.recovered else [])]:
        found.pop("training_data", None)
    found |= _rows_behind(cell, sources, bench)
    found["num_fewshot"] = str(task.config.num_fewshot or 0)
    if cell.score:
        found["score_data"] = bench.suite_digest(cell)
    if cell.chat_template:
        found["scored_template"] = bench.chat_template(cell.model)
    if cell.perplexity_tokens != 0:
        found["perplexity_text"] = _text(cell.perplexity_corpus, cell.data_dir)
    if calibrated and cell.calibration_corpus != TASK:
        found["calibration_text"] = bench.corpus(cell.calibration_corpus, cell.data_dir).digest
    if cell.recovered and cell.recover_corpus != TASK:
        found["recovery_text"] = bench.corpus(cell.recover_corpus, cell.data_dir).digest
    if cell.pruned and cell.masks is not None:
        found["masks"] = bench.given_masks(cell.masks)
    if (teacher := teacher_fingerprint(cell, bench)) is not None:
        found["teacher"] = teacher
    found |= {"dtype": str(resolve_dtype(cell.dtype, device)).removeprefix("torch."), "device": device.type}
    found |= {"versions": versions()}
    return found if trainer == "local" else found | {"trainer": trainer}


def check_identity(planned: Mapping[str, str], here: Mapping[str, str], where: str) -> None:
    """Refuses to run a cell on anything but what it was planned with. Device and precision are the worker's own.

    Raises:
        IdentityError: naming what differs.
    """
    different = [f"{name} is {here.get(name)}, not {planned.get(name)}" for name in sorted(set(planned) | set(here))
                 if name not in _PLACE and planned.get(name) != here.get(name)]  # fmt: skip
    if planned and different:
        raise IdentityError(
            f"{where}: what it names is not what the study was planned with: {'; '.join(different)}. Put the same files"
            " and versions on every machine, or resume the study to run what changed again."
        )


def cell_key(cell: CellConfig, identity: Mapping[str, str], mask_checksum: str = "", tuned: str = "") -> str:
    """Identity of a result: SHA-256 (16 hex digits) over the cell's settings, what its names stand for, its masks.

    Args:
        cell: what is asked for.
        identity: what its names stand for.
        mask_checksum: of its masks; empty where it has none.
        tuned: fingerprint of the study's dense baseline, where that teaches.
    """
    names = named(CellConfig, named=True)  # what they stand for is in the identity
    settings = {name: value for name, value in cell.canonical().items() if name not in names}
    if identity.get("dtype") == "float32":
        settings.pop("rounding")  # nothing is rounded
    own = [identity[what] for what in SOURCES if what in identity]
    if own and len(own) == len(cell.sources) and all(rows.startswith(TEXT) for rows in own):
        settings.pop("loss_on", None)  # of text every token is learned
    if cell.perplexity_tokens == 0:
        settings = {name: value for name, value in settings.items() if name != "perplexity_seq_len"}
    if "teacher" in identity:
        settings.pop("teacher")  # a name
    return digest([settings, dict(identity), mask_checksum, *([tuned] if tuned else [])])


def mask_key(config: MaskConfig, bench: Workbench) -> str:
    """Identity of a mask set: SHA-256 (16 hex digits) over its settings and what they look at.

    Raises:
        UserError: a model or calibration text that cannot be had.
    """
    config = replace(config, update=config.other_update or AUTO)
    said, left_out = plain_values(config), unsaid(config)
    values = {name: said[name] for name in named(MaskConfig, masks=True) if name not in left_out}
    values |= {"levels": list(config.levels)}
    model = bench.model_digests(config.model)
    behind = {"weights": model["weights"], "model_config": model["model_config"], "versions": sparse_ft.__version__}
    if config.needs_calibration:
        device = resolve_device(config.device)
        behind |= {"tokenizer": model["tokenizer"], "task": config.task, "versions": versions(), "device": device.type}
        behind["dtype"] = str(resolve_dtype(config.dtype, device))
        if config.calibration_corpus != TASK:
            values.pop("calibration_corpus")  # what it stands for counts
            return digest([values, behind | {"text": bench.corpus(config.calibration_corpus, config.data_dir).digest}])
        behind |= {name: value for name, value in bench.data_digests(config).items() if name == "task_definition"}
        behind["text"] = bench.data_digests(config).get("training_data", "none")
    return digest([values, behind])


def untuned_key(
    cell: CellConfig, identity: Mapping[str, str], start: str, mask_checksum: str, settings: Mapping[str, Any]
) -> str:
    """Identity of a score before fine-tuning: SHA-256 (64 hex digits).

    Args:
        start: fingerprint of the weights under the masks (after an update not the base's).
        settings: how is scored.
    """
    # to how a model is scored
    no_matter = ("training_data", *SOURCES, "chat_template", "masks", "calibration_text", "recovery_text", "teacher")
    scored = {name: value for name, value in identity.items() if name not in no_matter}
    usual = {name: value for name, value in defaults(ScoringSettings).items() if name in _LATER}
    how = {name: value for name, value in settings.items() if name not in ("perplexity_corpus", "num_fewshot")}
    how = {name: value for name, value in how.items() if name not in usual or value != usual[name]}
    return digest([cell.task, scored, start, mask_checksum, how], 64)


def recovery_parts(cell: CellConfig, identity: Mapping[str, str]) -> dict[str, Any]:
    """What a recovered model is made of, but for the pruned one that it begins with: cells that agree share it."""
    values, mode = cell.canonical(), MODES[cell.mode]
    names = [
        *defaults(RecoverySettings),
        "weight_decay",
        "warmup_fraction",
        "gradient_checkpointing",
        "rounding",
        "seed",
    ]
    names += [name for name in defaults(LoraSettings) if name in values and not mode.trains_weights]
    parts = {name: values.get(name) for name in names if name != "recover_corpus"}
    parts["max_grad_norm"] = cell.max_grad_norm
    behind = ["weights", "model_config", "tokenizer", "dtype", "device", "versions"]
    own_text = cell.recover_corpus == TASK
    behind += ["training_data", "task_definition"] if own_text else ["recovery_text"]
    parts |= {f"behind_{name}": identity.get(name) for name in behind}
    return parts | {"all_weights": mode.trains_weights, "task": cell.task if own_text else ""}


def plan_identity(cells: Sequence[CellConfig], identities: Sequence[Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """What the names of a plan's cells stand for, for people: model, data and program -> part -> digest."""
    told: dict[str, dict[str, str]] = {}
    for cell, identity in zip(cells, identities, strict=True):
        for name, value in identity.items():
            for what in _owners(cell, name):
                told.setdefault(what, {})[name] = value
    return {what: dict(sorted(parts.items())) for what, parts in sorted(told.items())}


@cache
def versions() -> str:
    """This program and the libraries whose arithmetic is in a result, without the builds' own suffixes."""
    return f"sparse_ft {sparse_ft.__version__}, " + ", ".join(
        f"{name} {version(name).split('+')[0]}" for name in _LIBRARIES
    )


def _rows_behind(cell: CellConfig, sources: Sequence[str], bench: Workbench) -> dict[str, str]:
    """The rows of one's own that a cell is trained on, and how their conversations are written."""
    own = {what: bench.rows(name, cell.data_dir) for what, name in zip(SOURCES, sources, strict=False) if name != TASK}
    found = {what: rows.digest for what, rows in own.items()}
    if any(rows.shape == MESSAGES for rows in own.values()):
        from sparse_ft.tasks.encoding import template_digest

        found["chat_template"] = template_digest(bench.tokenizer(cell.model))
    return found


def _owners(cell: CellConfig, name: str) -> Iterator[str]:
    if name in ("weights", "model_config", "tokenizer", "chat_template", "scored_template"):
        yield f"model {cell.model}"
    elif name in SOURCES:
        yield f"rows {cell.sources[SOURCES.index(name)]}"
    elif name == "score_data":
        yield f"data of {scored_text(cell.score)} ({cell.data_dir or 'none'})"
    elif name.endswith("_data") or name == "task_definition":
        yield f"data of {cell.task} ({cell.data_dir or 'none'})"
    elif name == "calibration_text":
        yield f"text {cell.calibration_corpus}"
    elif name == "recovery_text":
        yield f"text {cell.recover_corpus}"
    elif name == "teacher":
        yield f"teacher {cell.teacher}"
    elif name == "perplexity_text":
        yield f"text {cell.perplexity_corpus}"
    elif name == "masks":
        yield f"masks {cell.masks}"
    elif name == "versions":
        yield "program"


def _text(corpus: str, data_dir: str | None) -> str:
    if problem := corpus_problem("perplexity_corpus", corpus):
        raise UserError(problem)
    path = held_out_file(corpus, data_dir) if corpus in CORPORA else Path(corpus).expanduser()
    if corpus == TASK or path is None:
        return corpus
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def digest(value: Any, length: int = 16) -> str:
    """SHA-256 of plain data, so many hex digits of it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]
