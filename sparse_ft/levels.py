"""Sparsity levels as people write them, and the names of the files of a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sparse_ft.errors import UserError

__all__ = ["LevelPaths", "level_label", "level_steps", "levels_text", "parse_levels"]


def parse_levels(text: str, name: str = "sparsities") -> tuple[float, ...]:
    """Sparsities from the list ``0.5,0.7`` or the range ``0:0.9:0.1`` (both ends included), ascending, no doubles. An
    error speaks of them as ``name``.

    Raises:
        UserError: text that is neither, a level outside [0, 1], or a step that is not positive.
    """
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if not (step > 0 and last >= first):
                raise ValueError
            count = math.floor((last - first) / step + 1e-9)
            if count > 10_000:
                raise ValueError
            levels = [round(first + i * step, 10) for i in range(count + 1)]
        else:
            levels = [float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise UserError(f"{name} is '{text}'; write a list such as 0.5,0.7 or a range such as 0:0.9:0.1.") from None
    if not all(0 <= level <= 1 for level in levels):
        raise UserError(f"{name} is '{text}'; every level must lie between 0 and 1 (50 % is 0.5).")
    return tuple(sorted(set(levels)))


def levels_text(levels: Iterable[float]) -> str:
    """The list that `parse_levels` reads back as these very numbers, ascending, no doubles: ``0,0.3333333333,0.5``."""
    return ",".join(short if float(short := f"{x:g}") == x else repr(float(x)) for x in sorted(set(levels)))


def level_label(sparsity: float) -> str:
    """The level in percent, for names of files and runs: 0.5 -> ``50``, 0.125 -> ``12.5``."""
    return f"{round(100 * sparsity, 8):.8f}".rstrip("0").rstrip(".")


def level_steps(sparsities: Iterable[float]) -> tuple[Callable[[float], int], str]:
    """How levels become the whole numbers that MLflow takes as steps, and what these count: percent, or tenths of a
    percent where a level is not a whole percent (12.5 % -> 125)."""
    whole = all(abs(100 * level - round(100 * level)) < 1e-9 for level in sparsities)
    scale = 100 if whole else 1000
    return lambda level: round(scale * level), "percent" if whole else "tenths of a percent"


@dataclass(frozen=True)
class LevelPaths:
    """The files of one level, which lie side by side: ``masks_sparsity50_semi_structured_2of4.safetensors``, ...

    Attributes:
        masks: the mask file; the others are named after it.
    """

    masks: Path

    @classmethod
    def of(cls, folder: str | Path, sparsity: float, label: str, file_format: str = "safetensors") -> LevelPaths:
        """Those of a level (0..1) in a folder; ``label`` is the method as file names say it."""
        return cls(Path(folder) / f"{cls.prefix(sparsity)}{label}.{file_format}")

    @staticmethod
    def prefix(sparsity: float) -> str:
        """What the names of a level's mask files begin with, whatever the method."""
        return f"masks_sparsity{level_label(sparsity)}_"

    @property
    def statistics(self) -> Path:
        """JSON; see `sparse_ft.masks.statistics`."""
        return self._beside("stats", ".json")

    @property
    def histogram(self) -> Path:
        """Picture: how many tensors have which sparsity."""
        return self._beside("histogram", ".png")

    @property
    def heatmap(self) -> Path:
        """Picture: sparsity by block and projection."""
        return self._beside("heatmap", ".png")

    @property
    def model(self) -> Path:
        """Folder of the checkpoint whose kept weights were changed with the masks."""
        return self._beside("model")

    @property
    def smaller(self) -> Path:
        """Folder of the checkpoint without what the masks remove."""
        return self._beside("smaller")

    def _beside(self, kind: str, suffix: str = "") -> Path:
        return self.masks.with_name(self.masks.stem.replace("masks", kind, 1) + suffix)
