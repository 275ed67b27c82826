"""Makes the masks that a mask configuration asks for: finds model and text, then opens the one door."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_ft.masks.files import load_masks
from sparse_ft.models.loading import resolve_device
from sparse_ft.pruning.generator import MaskGenerator
from sparse_ft.pruning.output import MaskFile
from sparse_ft.pruning.settings import Calibration
from sparse_ft.study.config import MaskConfig
from sparse_ft.study.settings import pruning_settings
from sparse_ft.study.workbench import Workbench
from sparse_ft.tasks.examples import calibration_tokens

__all__ = ["GivenMasks", "make_masks", "mask_file"]


def make_masks(config: MaskConfig, bench: Workbench, output_dir: str | Path | None = None) -> list[MaskFile]:
    """Writes masks, statistics and figures of every level.

    Args:
        config: what masks.
        bench: finds model and task, shows progress.
        output_dir: instead of the configuration's own.

    Returns:
        one entry per level, ascending.

    Raises:
        UserError: a combination that makes no sense, a model or text that cannot be had.
    """
    settings = pruning_settings(config)
    settings.check()
    settings = replace(settings, device=str(resolve_device(config.device)))
    checkpoint = bench.checkpoint(config.model)
    calibration = None
    if settings.needs_calibration:
        task, tokenizer = bench.task(config.task, config.data_dir), bench.tokenizer(config.model)
        samples, length = config.calibration_samples, config.calibration_seq_len
        tokens = calibration_tokens(task, tokenizer, samples, length, config.seed)
        about = {"task": config.task, "samples": samples, "length": length, "seed": config.seed}
        calibration = Calibration(tokens, about)
    generator = MaskGenerator(checkpoint.folder, settings, calibration, config.model, bench.progress)
    return generator.generate(output_dir or config.output_dir, config.format)


@dataclass(frozen=True)
class GivenMasks:
    """A mask file that the user brings, and the cell fields that it settles."""

    file: MaskFile
    described: dict[str, Any]


def mask_file(path: str | Path) -> GivenMasks:
    """A mask file from disk as the engine would have handed it over.

    Raises:
        UserError: it is missing, damaged, or none of ours.
    """
    masks = load_masks(path)
    about = masks.metadata
    given = MaskFile(
        path=Path(path),
        sparsity=float(about.get("sparsity", masks.sparsity)),
        achieved=masks.sparsity,
        checksum=masks.checksum,
        weights=masks.n_weights,
        pruned=masks.n_pruned,
        statistics=None,
        histogram=None,
        heatmap=None,
        metadata=about,
        checkpoint=None,
    )
    described = {key: about[key] for key in ("method", "importance", "scope") if key in about}
    if described.get("method") == "random":
        described.update(importance="none", scope="none")
    return GivenMasks(given, {**described, "sparsity": given.sparsity})
