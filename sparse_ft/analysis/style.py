"""How lines look, the same in every figure: readable for the colour-blind and in grey."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_ft.files import atomic_path
from sparse_ft.settings import modes

__all__ = [
    "COLOURS",
    "DENSE",
    "LEVEL_COLOURS",
    "RULE",
    "Look",
    "drawing",
    "line_handle",
    "looks",
    "save_figure",
]

# After Okabe and Ito's palette, reordered and darkened so that neighbours differ in lightness too
# (L* 33, 53, 69, 61, 46, 75, 25): printed in grey they stay apart, and the markers tell the rest.
COLOURS = ("#0b4f8a", "#d55e00", "#4fb3a0", "#cc79a7", "#7a5c00", "#8ec3ee", "#5b2a6e")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DENSE, RULE = "#222222", "#777777"
LEVEL_COLOURS = "cividis"  # lightness grows evenly, for the colour-blind and in grey alike
_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "svg.hashsalt": "sparse_ft",  # the same numbers give the same file
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of one line; ``lines`` False where it is drawn as points only."""

    colour: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]
    filled: bool
    lines: bool = True

    @property
    def style(self) -> dict[str, object]:
        """Keyword arguments for ``Axes.plot``."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dashes if self.lines else "none",
            "markerfacecolor": self.colour if self.filled else "white",
            # The hollow one is larger, so that two lines that coincide show as a ring around a dot.
            "markersize": 5.0 if self.filled else 7.0,
            "markeredgewidth": 1.2,
        }


def looks(table: pd.DataFrame) -> Mapping[tuple[str, str, str], Look]:
    """A look for every (series, variant, mode): colour and marker by series, dashes by mode.

    With few variants each has its own colour; a search over many shows them as points in the colour of
    their series.
    """
    pruned = table[table["series"] != modes.DENSE.label]
    names = pruned[["series", "variant"]].drop_duplicates()
    many = names["variant"].nunique() > 4
    order = names["series"].drop_duplicates().tolist() if many else list(names.itertuples(index=False, name=None))
    result = {}
    for series, variant, mode in pruned[["series", "variant", "mode"]].drop_duplicates().itertuples(index=False):
        place = order.index(series if many else (series, variant))
        colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[(place + place // len(COLOURS)) % len(_MARKERS)]
        row = modes.MODES.get(mode)
        # Filled where the merged model is sparse, hollow where it is not.
        dashes, filled = (row.dashes, not row.loses_zeros) if row else ((0, (3, 1, 1, 1)), True)
        result[series, variant, mode] = Look(colour, marker, dashes, filled, not many)
    return result


def line_handle(label: str, **style: object) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **style)


@contextmanager
def drawing() -> Iterator[None]:
    """The settings all figures are drawn and saved under; what was set before comes back."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def save_figure(figure: Figure, folder: Path, name: str, dpi: int = 150) -> list[Path]:
    """Writes ``folder/name.png`` and ``.svg``, atomically; returns their paths."""
    FigureCanvasAgg(figure)
    paths: Sequence[tuple[Path, dict[str, object]]] = (
        (folder / f"{name}.png", {"dpi": dpi}),
        (folder / f"{name}.svg", {"metadata": {"Date": None}}),
    )
    for path, options in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, **options)
    return [path for path, _ in paths]
