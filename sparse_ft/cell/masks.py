"""Makes the masks that a mask configuration asks for: finds model and text, then runs the pruning engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.levels import LevelPaths
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.files import load_masks
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import check_device
from sparse_ft.models.mixtures import refitted
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.pruning.generator import MaskGenerator
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.pruning import TUNING
from sparse_ft.settings.rules import EXPERTS, STEPS

__all__ = [
    "GivenMasks",
    "check_given",
    "check_mask_set",
    "check_shrink",
    "foreign_masks",
    "make_masks",
    "mask_file",
    "read_manifest",
    "shrink",
    "write_manifest",
]

_MANIFEST = "mask_set.json"


def make_masks(config: MaskConfig, bench: Workbench, output_dir: str | Path | None = None) -> list[MaskFile]:
    """Writes masks and statistics of every level, and the figures that are asked for.

    Args:
        config: what masks.
        bench: finds model and task, shows progress.
        output_dir: instead of the configuration's own.

    Returns:
        one entry per level, ascending.

    Raises:
        UserError: a combination that makes no sense, a model or text that cannot be had.
    """
    return _generator(config, bench).generate(output_dir or config.output_dir, config.format, config.figures)


def check_mask_set(config: MaskConfig, bench: Workbench) -> None:
    """Whether the masks are possible at all: settings, shapes, device, text to look at. Makes none.

    Raises:
        UserError: they are not; what is wrong with the parameters is reported at once, before the model is looked for.
    """
    problems = list(config.problems())
    try:
        if config.needs_calibration or config.device != "auto":  # other masks need no device
            check_device(config.device)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError(" ".join(problems))
    _generator(config, bench)


def _generator(config: MaskConfig, bench: Workbench) -> MaskGenerator:
    config.check()
    checkpoint = bench.checkpoint(config.model)
    calibration = None
    if config.needs_calibration:
        from sparse_ft.models.tokenizers import embedding_rows
        from sparse_ft.pruning.calibration import Calibration
        from sparse_ft.tasks.corpora import drawn_windows
        from sparse_ft.tasks.examples import calibration_tokens, check_ids

        tokenizer, corpus = bench.tokenizer(config.model), config.calibration_corpus
        samples, length = config.calibration_samples, config.calibration_seq_len
        if corpus == TASK:
            tokens = calibration_tokens(bench.task(config), tokenizer, samples, length, config.seed)
        else:
            tokens = drawn_windows(bench.corpus(corpus, config.data_dir), tokenizer, samples, length, config.seed)
        check_ids(tokens.flatten().tolist(), embedding_rows(checkpoint.folder))
        text = {"task": config.task}
        if corpus != TASK:
            text = {"corpus": corpus, "text": bench.corpus(corpus, config.data_dir).digest}
        about = {**text, "samples": samples, "length": length, "seed": config.seed}
        calibration = Calibration(tokens, about)
    return MaskGenerator(checkpoint.folder, config, calibration, config.model, bench.progress)


def check_given(cell: CellConfig, bench: Workbench) -> None:
    """Whether a cell's mask file is there, fits its model, and was made of its weights.

    Raises:
        UserError: it is not; a study compares only masks of its own models.
    """
    given, base = mask_file(cell.masks).file, bench.checkpoint(cell.model)
    start = base if given.checkpoint is None else open_checkpoint(given.checkpoint)
    shapes = start.prunable_shapes()
    check_masks(refitted(start.config, given.load(), shapes), shapes, f"{cell.model}: {cell.masks}")
    if problem := foreign_masks(given, start, base):
        raise UserError(f"{problem}: a study compares only masks of its own models. Make them anew (compute_masks).")


def foreign_masks(file: MaskFile, start: Checkpoint, base: Checkpoint) -> str | None:
    """What says that masks were made of other weights than ``start``, which they come with, and the model ``base``."""
    for made_of, weights in (("fingerprint", start), ("source_fingerprint", base)):
        said = file.metadata.get(made_of)
        if said is not None and not weights.is_called(said):
            return f"the masks {file.path} were made from other weights ({said}, not {weights.fingerprint})"
    return None


def check_shrink(config: MaskConfig) -> None:
    """Raises UserError (one line) where no plain checkpoint can be made of the masks that are asked for."""
    if config.method not in ("structured", EXPERTS) or config.scope != "layer":
        raise UserError(
            f"shrink needs method structured or experts and scope layer, not {config.method} and {config.scope}: a"
            " plain checkpoint has whole channels, heads and experts, the same number in every block."
        )
    if 1.0 in config.levels:
        raise UserError("shrink: sparsities holds 1, which leaves no model. Leave that level out.")


def shrink(config: MaskConfig, files: Sequence[MaskFile], bench: Workbench) -> list[Path]:
    """Writes every level as a smaller checkpoint beside its masks; returns the folders."""
    from sparse_ft.pruning.shrink import shrink_checkpoint

    dense = bench.checkpoint(config.model).folder
    return [
        shrink_checkpoint(file.checkpoint or dense, file.load(), LevelPaths(file.path).smaller, bench.progress)
        for file in files
    ]


@dataclass(frozen=True)
class GivenMasks:
    """A mask file that the user brings, and the cell fields that it settles."""

    file: MaskFile
    described: dict[str, Any]

    def settle(self, cell: CellConfig) -> CellConfig:
        """The cell with the fields that the file settles: it is named by what made its masks.

        Raises:
            UserError: it asks for another update, refinement or reconstruction: they are done where masks are made.
        """
        settled, blank = replace(cell, **self.described), MaskConfig()
        asked, made = (
            {"refine": kind.refining.name, "update": kind.updating.name, "reconstruct": kind.reconstruct}
            for kind in (cell, settled)
        )
        for step in STEPS:
            if getattr(cell, step) != getattr(blank, step) and asked[step] != made[step]:
                raise UserError(
                    f"{step} is {asked[step]}, and the masks {self.file.path} were made with {step} {made[step]}: masks"
                    f" of a file are taken as they are. Leave {step} out, or make them anew."
                )
        return settled


def mask_file(path: str | Path) -> GivenMasks:
    """A mask file from disk as the engine would have handed it over.

    Raises:
        UserError: it is missing, damaged, or none of ours; or it belongs to a pruned checkpoint (the weights
            that stay were updated) which is no longer beside it.
    """
    masks, path = load_masks(path), Path(path)
    about = masks.metadata
    checkpoint = None
    if "source_fingerprint" in about:
        checkpoint = LevelPaths(path).model
        if not checkpoint.is_dir():
            raise UserError(f"Masks {path} belong to the pruned checkpoint {checkpoint.name}, which is gone.")
    given = MaskFile(
        path=path,
        sparsity=float(about.get("sparsity", masks.sparsity)),
        achieved=masks.sparsity,
        checksum=masks.checksum,
        weights=masks.n_weights,
        pruned=masks.n_pruned,
        statistics=None,
        histogram=None,
        heatmap=None,
        metadata=about,
        checkpoint=checkpoint,
    )
    return GivenMasks(given, _described(about) | {"sparsity": given.sparsity})


def _described(about: Mapping[str, Any]) -> dict[str, Any]:
    """The cell fields that the metadata of masks settle: what made them, whatever the cell says beside their name."""
    blank, calibration, tuning = MaskConfig(), about.get("calibration") or {}, about.get("reconstruction") or {}
    described = {key: about[key] for key in ("method", "importance", "scope") if key in about}
    if described.get("method") == "random":
        described.update(importance=None, scope=None)
    return described | {
        **{step: about.get(step, getattr(blank, step)) for step in STEPS},  # said only where names speak of it
        "pattern": about.get("pattern", blank.pattern),
        "allocation": about.get("allocation", blank.allocation),
        "calibration_corpus": calibration.get("corpus", blank.calibration_corpus),
        "calibration_samples": calibration.get("samples", blank.calibration_samples),
        "calibration_seq_len": calibration.get("length", blank.calibration_seq_len),
        **{name: tuning.get(name.removeprefix("reconstruct_"), getattr(blank, name)) for name in TUNING},
    }


def write_manifest(folder: Path, files: Sequence[MaskFile]) -> Path:
    """Writes ``mask_set.json``: what `make_masks` returned, paths relative to the folder, so that it can be moved."""

    def plain(value: Any) -> Any:
        return str(value.relative_to(folder)) if isinstance(value, Path) else value

    return write_json(folder / _MANIFEST, [{k: plain(v) for k, v in asdict(file).items()} for file in files])


def read_manifest(folder: Path) -> list[MaskFile] | None:
    """The mask set of a folder, every mask file read and its checksum compared; None where anything is amiss."""
    paths = ("path", "statistics", "histogram", "heatmap", "checkpoint", "summary")
    try:
        entries = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(MaskFile)}
        files = [
            MaskFile(**{k: folder / v if k in paths and v else v for k, v in entry.items() if k in known})
            for entry in entries
        ]
        whole = all(
            file.load().checksum == file.checksum and (file.checkpoint is None or file.checkpoint.is_dir())
            for file in files
        )
    except (OSError, ValueError, TypeError, UserError):
        return None
    return files if whole else None
