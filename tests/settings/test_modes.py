import ast
from pathlib import Path

import sparse_ft
from sparse_ft.settings import modes
from sparse_ft.settings.modes import MODES, PRUNED, mode_label

PACKAGE = Path(sparse_ft.__file__).parent


def test_names_in_short_tell_where_a_model_ends():
    assert [mode.short for mode in MODES.values()] == ["dense", "s2d", "s2s", "full", "pruned"]


def test_zeros_are_promised_or_lost_only_where_there_are_any():
    assert [name for name, mode in MODES.items() if mode.keeps_zeros] == ["sparse_to_sparse", "full", "pruned"]
    assert [name for name, mode in MODES.items() if mode.loses_zeros] == ["sparse_to_dense"]


def test_what_is_no_mode_is_called_by_its_name():
    assert (mode_label("sparse_to_sparse"), mode_label("untuned")) == ("sparse to sparse", "untuned")


def test_a_mode_is_named_in_its_table_alone():
    """Everywhere else its row is asked, so that a new mode is a new row."""
    table = Path(modes.__file__)
    names = set(MODES) - {PRUNED.name}  # of weights that is said elsewhere too
    named = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != table
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert named == []
