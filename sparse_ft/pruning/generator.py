"""The one door of the pruning engine: a checkpoint in, mask files of every level out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sparse_ft
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.coverage import coverage_report
from sparse_ft.pruning.histogram import exact_count
from sparse_ft.pruning.output import LevelFiles, MaskFile
from sparse_ft.pruning.settings import Calibration, PruningSettings
from sparse_ft.pruning.sources import KeySource, MagnitudeSource, RandomSource
from sparse_ft.pruning.streaming import MaskSink, write_global, write_groups, write_layers, write_rows

__all__ = ["MaskGenerator"]


class MaskGenerator:
    """Makes masks of one checkpoint.

    Args:
        checkpoint_folder: a Hugging Face folder with safetensors, one file or shards.
        settings: what to prune and how.
        calibration: text, where ``settings.needs_calibration``.
        model_name: as the masks' metadata should name the model; default: the folder's name.
        progress: told of every stage.

    Raises:
        UserError: settings that make no sense, a checkpoint that cannot be read or is of an unknown
            architecture, missing calibration data, or a pattern that the tensors' shapes do not fit. All of it
            before any weight is read.
    """

    def __init__(
        self,
        checkpoint_folder: str | Path,
        settings: PruningSettings,
        calibration: Calibration | None = None,
        model_name: str = "",
        progress: Progress = SILENT,
    ):
        settings.check()
        self.settings = settings
        self.checkpoint = Checkpoint(checkpoint_folder)
        self.shapes = self.checkpoint.prunable_shapes()
        self.calibration = calibration
        self.model_name = model_name or self.checkpoint.folder.name
        self.progress = progress
        self.threads = settings.threads or len(os.sched_getaffinity(0))
        self._check_inputs()

    def generate(
        self, output_dir: str | Path, file_format: str = "safetensors", figures: bool = True
    ) -> list[MaskFile]:
        """Writes the masks, statistics and figures of every level, and ``coverage.json``.

        Returns:
            one entry per level, ascending.

        Raises:
            UserError: NaN or infinite weights (names the tensor), an unknown format.
        """
        folder = Path(output_dir)
        files = LevelFiles(folder, self.settings.label, self.settings.levels, self.shapes, file_format)
        try:
            self._write(files)
            results = files.finish(self._metadata, figures=figures)
        finally:
            files.abort()
        report = coverage_report(self.checkpoint)
        report["levels"] = [_level_coverage(result, report["parameters"]) for result in results]
        write_json(folder / "coverage.json", report)
        return results

    def _check_inputs(self) -> None:
        if self.settings.needs_calibration:
            if self.calibration is None:
                raise UserError(
                    f"importance {self.settings.importance_name}, allocation {self.settings.allocation}: calibration"
                    " text is needed. Name a task (and data_dir) to take it from."
                )
            self.calibration.check()
        if self.settings.method == "semi_structured":
            group = self.settings.pattern_m
            for name, shape in self.shapes.items():
                if shape[-1] % group:
                    raise UserError(
                        f"{name} has {shape[-1]} inputs, which groups of {group} do not divide. Take another pattern."
                    )

    def _write(self, sink: MaskSink) -> None:
        source = self._source()
        settings = self.settings
        common = {"threads": self.threads, "progress": self.progress}
        if settings.method == "semi_structured":
            write_groups(source, settings.pattern_n, settings.pattern_m, sink, **common)
        elif settings.scope == "global":
            write_global(source, settings.levels, sink, **common)
        elif settings.scope == "layer":
            write_layers(source, self._counts(), sink, **common)
        else:
            write_rows(source, self._counts(rows=True), sink, **common)

    def _source(self) -> KeySource:
        if self.settings.method == "random":
            return RandomSource(self.shapes, self.settings.seed)
        return MagnitudeSource(self.checkpoint, list(self.shapes))

    def _counts(self, rows: bool = False) -> Mapping[str, Sequence[int]]:
        """How many weights of each tensor (or of each of its rows) every level prunes."""
        return {
            name: [exact_count(level, shape[-1] if rows else _size(shape)) for level in self.settings.levels]
            for name, shape in self.shapes.items()
        }

    def _metadata(self, level: int) -> dict[str, Any]:
        settings = self.settings
        about: dict[str, Any] = {
            "method": settings.method,
            "importance": settings.importance_name,
            "scope": settings.scope,
            "sparsity": settings.levels[level],
            "model": self.model_name,
            "fingerprint": self.checkpoint.fingerprint,
            "calibration": None,
            "seed": settings.seed,
            "version": sparse_ft.__version__,
        }
        if settings.needs_calibration and self.calibration is not None:
            samples, length = self.calibration.token_ids.shape
            about["calibration"] = {"samples": samples, "length": length, **self.calibration.description}
        if settings.method == "semi_structured":
            about["pattern"] = f"{settings.pattern_n}:{settings.pattern_m}"
        if settings.allocation != "uniform":
            about["allocation"] = settings.allocation
        return about


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _level_coverage(result: MaskFile, parameters: int) -> dict[str, Any]:
    return {
        "sparsity": result.sparsity,
        "achieved": result.achieved,
        "pruned": result.pruned,
        "pruned_fraction_of_all_parameters": result.pruned / parameters if parameters else 0.0,
        "checksum": result.checksum,
    }
