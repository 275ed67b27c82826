"""What a run of the generator leaves on disk: masks, statistics and figures of every level."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.levels import level_label
from sparse_ft.masks.figures import save_heatmap, save_histogram
from sparse_ft.masks.files import FORMATS, MaskFileWriter, load_masks, save_masks
from sparse_ft.masks.mask_set import MaskSet, count_kept
from sparse_ft.masks.statistics import statistics_of_counts

__all__ = ["LevelFiles", "MaskFile", "level_stem"]


@dataclass(frozen=True)
class MaskFile:
    """One level's files.

    Attributes:
        path: the masks.
        sparsity: the level asked, 0..1; ``achieved`` the fraction of weights that the masks prune.
        checksum: the masks' identity.
        weights, pruned: counts over all masks.
        statistics, histogram, heatmap: the files beside it (pictures None where not asked for).
        metadata: as in the mask file.
        checkpoint: for importances that change weights (SparseGPT), the folder of the pruned checkpoint that
            the masks belong to; else None, and they belong to the checkpoint they were made from.
    """

    path: Path
    sparsity: float
    achieved: float
    checksum: str
    weights: int
    pruned: int
    statistics: Path
    histogram: Path | None
    heatmap: Path | None
    metadata: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None

    def load(self) -> MaskSet:
        """The masks, read and checked.

        Raises:
            UserError: the file is missing or damaged, or it holds other masks than this entry speaks of.
        """
        masks = load_masks(self.path)
        if masks.checksum != self.checksum:
            raise UserError(
                f"Mask file {self.path} holds the masks {masks.checksum[:12]} and not {self.checksum[:12]}, which were"
                " asked for: it was replaced. Make them again with compute_masks, in a folder of their own."
            )
        return masks


def level_stem(level: float, label: str) -> str:
    """What the names of a level's files share: ``sparsity50_semi_structured_2of4`` (masks_STEM.safetensors, ...)."""
    return f"sparsity{level_label(level)}_{label}"


class LevelFiles:
    """The mask files of all levels, written side by side, row block by row block (a `MaskSink`).

    Args:
        folder: where the files go.
        label: the method as file names say it.
        levels: the sparsities, ascending.
        shapes: shape of every mask.
        file_format: ``safetensors``, ``npz`` or ``pt``.

    Raises:
        UserError: an unknown format.
    """

    def __init__(
        self,
        folder: str | Path,
        label: str,
        levels: Sequence[float],
        shapes: Mapping[str, tuple[int, ...]],
        file_format: str = "safetensors",
    ):
        if file_format not in FORMATS:
            raise UserError(f"format '{file_format}' is none of {', '.join(FORMATS)}.")
        self.folder, self.levels, self.shapes = Path(folder), list(levels), dict(shapes)
        self._format = file_format
        self.stems = [level_stem(level, label) for level in levels]
        self._kept = [dict.fromkeys(shapes, 0) for _ in levels]
        self._writers: list[MaskFileWriter] = []
        self._opening = threading.Lock()

    def append(self, level: int, name: str, packed: np.ndarray) -> None:
        """The next packed rows of a mask; the set bits are counted on the way."""
        if len(self._writers) < len(self.levels):
            self._open()
        self._writers[level].append(name, packed)
        self._kept[level][name] += count_kept(packed)

    def finish(
        self,
        metadata: Callable[[int], Mapping[str, Any]],
        checkpoints: Sequence[Path | None] | None = None,
        figures: bool = True,
    ) -> list[MaskFile]:
        """Closes the files and draws the figures.

        Args:
            metadata: of a level, without ``achieved``, which is added.
            checkpoints: each level's pruned checkpoint, where there is one.
            figures: draw the pictures too.
        """
        weights = sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())
        described = [dict(metadata(level)) for level in range(len(self.levels))]
        pruned_of = [weights - sum(kept.values()) for kept in self._kept]
        for about, pruned in zip(described, pruned_of, strict=True):
            about["achieved"] = pruned / weights if weights else 0.0
        with ThreadPoolExecutor(4) as pool:  # closing waits for the disk, once for each file
            checksums = list(pool.map(MaskFileWriter.close, self._writers, described))
        results = []
        for level, stem in enumerate(self.stems):
            about, pruned, checksum = described[level], pruned_of[level], checksums[level]
            path = self.folder / f"masks_{stem}.{self._format}"
            if self._format != "safetensors":
                save_masks(load_masks(self._written(stem)), path)
                self._written(stem).unlink()
            numbers = statistics_of_counts(self.shapes, self._kept[level], about, checksum)
            results.append(
                MaskFile(
                    path=path,
                    sparsity=self.levels[level],
                    achieved=about["achieved"],
                    checksum=checksum,
                    weights=weights,
                    pruned=pruned,
                    statistics=write_json(self.folder / f"stats_{stem}.json", numbers),
                    histogram=save_histogram(numbers, self.folder / f"histogram_{stem}.png") if figures else None,
                    heatmap=save_heatmap(numbers, self.folder / f"heatmap_{stem}.png") if figures else None,
                    metadata=about,
                    checkpoint=checkpoints[level] if checkpoints else None,
                )
            )
        return results

    def abort(self) -> None:
        """Removes what was written and not finished."""
        for writer in self._writers:
            writer.abort()

    def _open(self) -> None:
        """Opens the files when the first rows come: scores may take hours, and a run may be killed before."""
        with self._opening:
            for stem in self.stems[len(self._writers) :]:
                self._writers.append(MaskFileWriter(self._written(stem), self.shapes))

    def _written(self, stem: str) -> Path:
        """Other formats cannot be written row by row: they are converted from a safetensors file."""
        hidden = "" if self._format == "safetensors" else ".converting-"
        return self.folder / f"{hidden}masks_{stem}.safetensors"
