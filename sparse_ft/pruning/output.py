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
from sparse_ft.levels import LevelPaths, level_label
from sparse_ft.masks.files import MaskFileWriter, load_masks, save_masks
from sparse_ft.masks.mask_set import MaskSet, count_kept
from sparse_ft.masks.statistics import statistics_of_counts
from sparse_ft.settings.commands import FORMATS

__all__ = ["LevelFiles", "MaskFile", "block_error", "error_points"]


@dataclass(frozen=True)
class MaskFile:
    """One level's files.

    Attributes:
        path: the masks.
        sparsity: the level asked, 0..1; ``achieved`` the fraction of weights that the masks prune.
        checksum: the masks' identity.
        weights, pruned: counts over all masks.
        statistics, histogram, heatmap: the files beside it (pictures None where not asked for).
        summary: the picture of all levels of the set; None where not asked for.
        metadata: as in the mask file.
        checkpoint: where the weights that stay are updated, the folder of the pruned checkpoint that
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
    summary: Path | None = None

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
        self.paths = [LevelPaths.of(folder, level, label, file_format) for level in levels]
        self._label, self._format = label, file_format
        self._kept = [dict.fromkeys(shapes, 0) for _ in levels]
        self._writers: list[MaskFileWriter] = []
        self._opening = threading.Lock()

    def append(self, level: int, name: str, packed: np.ndarray) -> None:
        """The next packed rows of a mask; the set bits are counted on the way."""
        if len(self._writers) < len(self.levels):
            self._open()
        self._writers[level].append(name, packed)
        self._kept[level][name] += count_kept(packed)

    def packed(self, level: int, name: str) -> np.ndarray:
        """A mask that was written to its end, ``uint8 [..., ceil(C/8)]``."""
        return self._writers[level].read(name)

    def finish(
        self,
        metadata: Callable[[int], Mapping[str, Any]],
        checkpoints: Sequence[Path | None] | None = None,
        figures: str = "summary",
    ) -> list[MaskFile]:
        """Closes the files and draws the figures.

        Args:
            metadata: of a level, without ``achieved``, which is added.
            checkpoints: each level's pruned checkpoint, where there is one.
            figures: pictures of every level and of all (``all``), of all levels in one (``summary``), or ``none``.
        """
        weights = sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())
        described = [dict(metadata(level)) for level in range(len(self.levels))]
        pruned_of = [weights - sum(kept.values()) for kept in self._kept]
        for about, pruned in zip(described, pruned_of, strict=True):
            about["achieved"] = pruned / weights if weights else 0.0
        with ThreadPoolExecutor(4) as pool:  # closing waits for the disk, once for each file
            checksums = list(pool.map(MaskFileWriter.close, self._writers, described))
        statistics, drawn = [], figures == "all"
        for level, paths in enumerate(self.paths):
            if self._format != "safetensors":
                save_masks(load_masks(self._written(paths)), paths.masks)
                self._written(paths).unlink()
            statistics.append(statistics_of_counts(self.shapes, self._kept[level], described[level], checksums[level]))
            write_json(paths.statistics, statistics[-1])
        summary = self._draw(statistics, figures)
        return [
            MaskFile(
                path=paths.masks,
                sparsity=self.levels[level],
                achieved=described[level]["achieved"],
                checksum=checksums[level],
                weights=weights,
                pruned=pruned_of[level],
                statistics=paths.statistics,
                histogram=paths.histogram if drawn else None,
                heatmap=paths.heatmap if drawn else None,
                metadata=described[level],
                checkpoint=checkpoints[level] if checkpoints else None,
                summary=summary,
            )
            for level, paths in enumerate(self.paths)
        ]

    def _draw(self, statistics: Sequence[Mapping[str, Any]], figures: str) -> Path | None:
        """The pictures that are asked for; returns the summary's path."""
        if figures == "none":
            return None
        from sparse_ft.masks.figures import draw_levels, save_summary  # matplotlib is imported where it draws

        if figures == "all":
            draw_levels([paths.statistics for paths in self.paths])
        return save_summary(statistics, self.folder / f"summary_{self._label}.png")

    def abort(self) -> None:
        """Removes what was written and not finished."""
        for writer in self._writers:
            writer.abort()

    def _open(self) -> None:
        """Opens the files when the first rows come: scores may take hours, and a run may be killed before."""
        with self._opening:
            for paths in self.paths[len(self._writers) :]:
                self._writers.append(MaskFileWriter(self._written(paths), self.shapes))

    def _written(self, paths: LevelPaths) -> Path:
        """Other formats cannot be written row by row: they are converted from a safetensors file."""
        hidden = "" if self._format == "safetensors" else ".converting-"
        return paths.masks.with_name(f"{hidden}{paths.masks.stem}.safetensors")


def block_error(sparsity: float) -> str:
    """The metric of what a level makes of a block's output (see `sparse_ft.pruning.blockerror`):
    ``prune/block_error_70``."""
    return f"prune/block_error_{level_label(sparsity)}"


def error_points(sparsity: float, before: float, after: float) -> dict[str, float]:
    """A block's errors around its reconstruction at a level, by the names of metrics: ``prune/error_before_70``."""
    label = level_label(sparsity)
    return {f"prune/error_before_{label}": before, f"prune/error_after_{label}": after}
