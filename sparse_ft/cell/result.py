"""What a cell measured. Plain data; nothing is logged here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_ft.tracking.record import Tag

__all__ = ["CellResult"]


@dataclass
class CellResult:
    """What a cell measured. A metric that was not measured is absent.

    Attributes:
        metrics: by their names in MLflow.
        protocol: how accuracy, perplexity and throughput were measured.
        series: metric -> [(step, value)].
        tags: what identifies the inputs, and warnings.
        artifacts: (file or folder, folder among the run's artifacts).
        tables: name among the run's artifacts -> rows, each column -> value.
        merged: the merged checkpoint, where it was kept.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[tuple[Path, str]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    merged: Path | None = None

    def add_scores(self, scores: Mapping[str, float], suffix: str = "") -> None:
        """Adds the scores of one model as ``eval/<name><suffix>``."""
        self.metrics.update({f"eval/{name}{suffix}": value for name, value in scores.items()})

    def warn(self, text: str) -> None:
        """Adds to the tag ``warning``."""
        self.tags[Tag.WARNING] = "; ".join(filter(None, [self.tags.get(Tag.WARNING), text]))
