"""Pictures of a mask set's statistics: where the zeros are.

``python -m sparse_ft.masks.figures stats_....json ...`` draws histogram and heatmap of each file beside it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparse_ft.cores import cores
from sparse_ft.files import atomic_path
from sparse_ft.levels import LevelPaths
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.masks.statistics import block_sparsities, mask_statistics

__all__ = ["block_table", "draw_levels", "save_heatmap", "save_histogram", "save_summary"]

# Of the forward pass, in every family (a test holds it against the table of families).
_ORDER = (
    "qkv_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "w1",
    "w3",
    "w2",
)
_BAR, _LINE, _MUTED = "#3b6ea5", "#c44e52", "#555555"


def block_table(statistics: Mapping[str, Any]) -> tuple[list[int], list[str], np.ndarray]:
    """Sparsity by block and projection, read from the tensor names.

    The first number in a name is the block, the last word before ``weight`` the projection; the experts of
    a block are taken together.

    Returns:
        blocks, projections in the order of the forward pass, and sparsities ``[projections, blocks]``
        (NaN where a block lacks a projection).
    """
    weights: dict[tuple[str, int], int] = {}
    pruned: dict[tuple[str, int], int] = {}
    for name, entry in statistics["tensors"].items():
        number = re.search(r"\.(\d+)\.", name)
        cell = (_projection(name), int(number.group(1)) if number else 0)
        weights[cell] = weights.get(cell, 0) + entry["weights"]
        pruned[cell] = pruned.get(cell, 0) + entry["pruned"]
    blocks = sorted({block for _, block in weights})
    names = {projection for projection, _ in weights}
    projections = [name for name in _ORDER if name in names] + sorted(names - set(_ORDER))
    table = np.full((len(projections), len(blocks)), np.nan)
    for (projection, block), count in weights.items():
        table[projections.index(projection), blocks.index(block)] = pruned[projection, block] / max(count, 1)
    return blocks, projections, table


def save_histogram(masks: MaskSet | Mapping[str, Any], path: str | Path) -> Path:
    """Draws how many tensors have which sparsity; lines mark the level asked and the one achieved.

    Args:
        masks: a mask set, or what `mask_statistics` returned for it.
        path: an image file; its suffix chooses the format.
    """
    statistics = _statistics(masks)
    values = 100 * np.array([entry["sparsity"] for entry in statistics["tensors"].values()])
    figure, axes = _figure(7.0, 3.8)
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    if high - low < 1.0:  # all tensors alike: one bar in a window that shows where it stands
        low, high = max(0.0, (low + high) / 2 - 5), min(100.0, (low + high) / 2 + 5)
    axes.hist(values, bins=np.linspace(low, high, 32), color=_BAR, edgecolor="white", linewidth=0.5)
    _lines(axes, statistics)
    axes.set_xlabel("sparsity of a tensor (%)")
    axes.set_ylabel("tensors")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(_title(statistics), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower right", ncols=2)
    return _save(figure, path)


def save_summary(levels: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draws all levels of a mask set in one picture: one line a level, by block and by projection.

    Args:
        levels: what `mask_statistics` returns, level by level; at least one.
        path: an image file; its suffix chooses the format.
    """
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_block, by_projection = figure.subplots(1, 2, sharey=True)
    for number, statistics in enumerate(levels):
        blocks, projections, _ = block_table(statistics)
        shade = 0.25 + 0.75 * (number + 1) / len(levels)
        style = {"color": _BAR, "alpha": shade, "linewidth": 1.5, "marker": ".", "markersize": 4}
        by_block.plot(blocks, [100 * value for value in block_sparsities(statistics)], **style)
        counts = _by_projection(statistics)
        values = [100 * counts[name][1] / max(counts[name][0], 1) for name in projections]
        by_projection.plot(projections, values, **style | {"linestyle": ":"})
        achieved = 100 * statistics["sparsity"]["achieved"]
        by_projection.annotate(
            f"{achieved:.4g} %", (1.02, achieved), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    by_block.set_xlabel("block")
    by_block.xaxis.get_major_locator().set_params(integer=True)
    by_block.set_ylabel("sparsity (%)")
    by_projection.set_xlabel("projection; right: achieved over all")
    by_projection.tick_params("x", labelsize=8, rotation=30)
    for axes in (by_block, by_projection):
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    by_block.set_title(_title(levels[0]), fontsize=10, loc="left")
    return _save(figure, path)


def draw_levels(statistics: Sequence[Path], processes: int | None = None) -> None:
    """Draws histogram and heatmap of every statistics file beside it, in processes side by side.

    Args:
        statistics: the JSON files.
        processes: how many; None: one per core that this process may use.

    Raises:
        OSError: a picture could not be drawn; what its process said went to stderr.
    """
    many = min(len(statistics), processes or cores())
    shares = [[str(path) for path in statistics[share::many]] for share in range(many)]
    found = {"PYTHONPATH": os.pathsep.join(sys.path)}  # where this interpreter finds its modules
    drawing = [
        subprocess.Popen([sys.executable, "-m", "sparse_ft.masks.figures", *share], env=os.environ | found)
        for share in shares
    ]
    if sum(process.wait() != 0 for process in drawing):  # all are waited for
        raise OSError(f"the pictures beside {statistics[0]} could not be drawn")


def save_heatmap(masks: MaskSet | Mapping[str, Any], path: str | Path) -> Path:
    """Draws sparsity as colour, one column a block and one row a projection; numbers where they fit.

    Args: as `save_histogram`.
    """
    statistics = _statistics(masks)
    blocks, projections, table = block_table(statistics)
    width = 2.6 + 0.32 * max(len(blocks), 10) if len(blocks) <= 40 else min(24.0, 2.6 + 0.17 * len(blocks))
    figure, axes = _figure(width, 1.5 + 0.36 * len(projections))
    percent = 100 * table
    low, high = (float(np.nanmin(percent)), float(np.nanmax(percent))) if percent.size else (0.0, 100.0)
    if high - low < 2:  # noise of a tenth of a per cent must not look like structure
        low, high = max(0.0, (low + high) / 2 - 1), min(100.0, (low + high) / 2 + 1)
    image = axes.imshow(percent, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    step = 1 if len(blocks) <= 40 else 5
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], fontsize=8)
    axes.set_yticks(range(len(projections)), projections, fontsize=9)
    axes.set_xlabel("block")
    if len(blocks) <= 40:
        for (row, column), value in np.ndenumerate(percent):
            if np.isfinite(value):
                dark = (value - low) / (high - low) < 0.6
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.set_label("sparsity (%)")
    axes.set_title(_title(statistics), fontsize=10, loc="left")
    return _save(figure, path)


def _projection(name: str) -> str:
    return [word for word in name.split(".") if not word.isdigit() and word != "weight"][-1]


def _by_projection(statistics: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Projection -> weights, and how many of them are pruned."""
    counts: dict[str, tuple[int, int]] = {}
    for name, entry in statistics["tensors"].items():
        weights, pruned = counts.get(_projection(name), (0, 0))
        counts[_projection(name)] = (weights + entry["weights"], pruned + entry["pruned"])
    return counts


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _statistics(masks: MaskSet | Mapping[str, Any]) -> Mapping[str, Any]:
    return mask_statistics(masks) if isinstance(masks, MaskSet) else masks


def _lines(axes, statistics: Mapping[str, Any]) -> None:
    asked, achieved = statistics["sparsity"]["asked"], statistics["sparsity"]["achieved"]
    axes.axvline(100 * achieved, color=_LINE, linewidth=1.5, label=f"achieved over all {100 * achieved:.3f} %")
    if asked is not None:
        axes.axvline(100 * asked, color=_MUTED, linewidth=1.2, linestyle="--", label=f"asked {100 * asked:g} %")


def _title(statistics: Mapping[str, Any]) -> str:
    about = statistics["metadata"]
    words = [about.get("method"), about.get("importance"), about.get("scope")]
    what = ", ".join(str(word) for word in words if word)
    return f"{about.get('model') or 'masks'}: {what}" if what else str(about.get("model") or "masks")


def _save(figure: Figure, path: str | Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return Path(path)


def _draw(file: Path) -> None:
    statistics = json.loads(file.read_text(encoding="utf-8"))
    paths = LevelPaths(file.with_name(file.name.replace("stats", "masks", 1)))
    save_histogram(statistics, paths.histogram)
    save_heatmap(statistics, paths.heatmap)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        _draw(Path(argument))
