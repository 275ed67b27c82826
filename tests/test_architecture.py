"""docs/architecture.md: what it names is there, and its picture is drawn from the sources."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pkgutil import resolve_name

import pytest
from documents import ROOT, text

PAGE = "docs/architecture.md"


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("imports_hook", ROOT / "docs" / "imports.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_function_and_file_that_the_page_names_is_there():
    functions = re.findall(r"`(sparse_ft(?:\.\w+)+)`", text(PAGE))
    assert len(functions) > 12 and all(callable(resolve_name(name)) for name in functions)
    for path in re.findall(r"`(sparse_ft/[\w/.]*)`", text(PAGE)):
        assert (ROOT / path).exists(), path


def test_the_life_of_a_cell_takes_twelve_lines():
    assert re.findall(r"^(\d+)\. `sparse_ft", text(PAGE), re.MULTILINE) == [str(number) for number in range(1, 13)]


def test_every_part_of_the_package_stands_on_a_floor_of_the_page(hook):
    parts = {part for floor in hook.floors() for part in floor}
    assert parts == {path.stem for path in (ROOT / "sparse_ft").iterdir() if not path.name.startswith("__")}
    rows = re.findall(r"^\| (`.*?`) \|", text(PAGE).split("\n## The life")[0], re.MULTILINE)
    assert parts == {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_picture_has_every_part_and_no_import_upwards(hook):
    svg = hook.on_page_markdown(f"before\n{hook.MARK}\nafter")
    assert svg.startswith("before\n<svg") and svg.endswith("</svg>\nafter") and hook.on_page_markdown("x") == "x"
    drawn = ElementTree.fromstring(svg.removeprefix("before\n").removesuffix("\nafter"))
    dots = drawn.findall(".//{*}circle")
    assert any(re.match(r"cell imports lora \(\d+\)$", dot[0].text) for dot in dots)
    for dot in dots:  # right of the diagonal
        assert int(dot.get("cx")) - hook.LEFT > int(dot.get("cy")) - hook.TOP, dot[0].text
    assert len(drawn.findall(".//{*}text")) == 2 * sum(map(len, hook.floors()))
