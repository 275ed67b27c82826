"""Which checks are made again."""

import pytest

from sparse_ft.errors import UserError
from sparse_ft.study.checks.passed import Checks


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.txt").write_text("one")
    return folder


@pytest.fixture
def made(rows):
    """Makes a check of the rows, and returns whether it was made and what it said."""

    def make(about="rows", repeat=False):
        read = []

        def check(folder):
            read.append((folder / "rows.txt").read_text())
            if not read[0]:
                raise UserError("no rows")

        checks = Checks(repeat)
        checks.once([about], [rows, "boolq"], check, rows)
        return read != [], [*checks.problems]

    return make


def test_what_has_passed_is_not_checked_again_until_something_changes(made, rows):
    assert made() == (True, [])
    assert made() == (False, [])
    assert made(repeat=True) == (True, [])
    assert made("other values") == (True, [])
    (rows / "rows.txt").write_text("two, changed")
    assert made() == (True, [])
    assert made() == (False, [])
    (rows / "more.txt").write_text("")
    assert made() == (True, [])


def test_what_has_not_passed_is_checked_each_time(made, rows):
    (rows / "rows.txt").write_text("")
    assert made() == made() == (True, ["no rows"])


def test_without_a_cache_everything_is_checked(made, rows, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(rows / "rows.txt"))  # a file
    assert made() == made() == (True, [])
