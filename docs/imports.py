"""The picture of docs/architecture.md: who imports whom, drawn from the sources whenever the site is built.

A hook of MkDocs. Its environment has no torch: grimp reads the sources without importing them, and the floors are those
of the import contract in pyproject.toml.
"""

from __future__ import annotations

import re
import sys
import tomllib
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- imports -->"
STEP, LEFT, TOP = 22, 190, 100  # pixels


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts the picture where a page asks for it."""
    return markdown.replace(MARK, picture()) if MARK in markdown else markdown


def floors() -> list[list[str]]:
    """The parts of the package by floor, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [re.split(r" [|:] ", layer) for layer in layers]


def imports() -> dict[tuple[str, str], int]:
    """(part that imports, part that is imported) -> number of pairs of modules."""
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph("sparse_ft", exclude_type_checking_imports=True, cache_dir=None)
    sys.path.remove(str(ROOT))
    found: dict[tuple[str, str], int] = {}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            parts = tuple((name.split(".") + [""])[1] for name in (module, other))
            if all(parts) and parts[0] != parts[1]:
                found[parts] = found.get(parts, 0) + 1
    return found


def lines(part: str) -> int:
    """Lines of code of a part."""
    path = ROOT / "sparse_ft" / part
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def picture() -> str:
    """An SVG table: a row a part, the highest floor first; a dot where it imports the part of a column."""
    found, house = imports(), []
    for floor in floors():  # within one, whoever imports another comes first
        importers = {part: [other for other in floor if (other, part) in found] for part in floor}
        house.append(list(TopologicalSorter(importers).static_order()))
    place = {part: number for number, part in enumerate(part for floor in house for part in floor)}
    size = STEP * len(place)
    drawn = []
    for number, floor in enumerate(house):
        top = TOP + STEP * place[floor[0]]
        shade = 0.08 if number % 2 else 0.03
        drawn.append(
            f'<rect x="0" y="{top}" width="{LEFT + size}" height="{STEP * len(floor)}" fill-opacity="{shade}"/>'
        )
    for part, row in place.items():
        y, x = TOP + STEP * row + STEP // 2, LEFT + STEP * row + STEP // 2
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(part)} · {lines(part):,}</text>')
        drawn.append(f'<text transform="translate({x + 4} {TOP - 8}) rotate(-60)">{escape(part)}</text>')
        drawn.append(f'<path d="M{x - 4} {y}h8" stroke="currentColor" stroke-opacity="0.4"/>')
    for (importer, imported), count in sorted(found.items()):
        x, y = (start + STEP * place[part] + STEP // 2 for start, part in ((LEFT, imported), (TOP, importer)))
        drawn.append(
            f'<circle cx="{x}" cy="{y}" r="{min(2 + count**0.5, STEP / 2):.1f}">'
            f"<title>{importer} imports {imported} ({count})</title></circle>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + size + 40} {TOP + size}" role="img" '
        f'font-size="12" fill="currentColor" aria-label="Who imports whom">{"".join(drawn)}</svg>'
    )
