import json
import math

import pytest

from sparse_ft.files import atomic_folder, atomic_path, load_yaml, write_json, write_text


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "table.csv"
    with atomic_path(target) as temporary:
        temporary.write_text("a,b")
        assert temporary.suffix == ".csv"
        assert not target.exists()
    assert target.read_text() == "a,b"
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = write_text(tmp_path / "file.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "third").write_text("third")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_json_is_strict(tmp_path):
    path = write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": math.nan})
    assert not (tmp_path / "b.json").exists()


def test_numbers_of_yaml_are_those_of_its_version_1_2():
    text = "[1e-4, 12E03, -1.5e+3, .5, 1., 1_000, 010, 0x10, .inf, 2:4, 2026-01-02, 1e2x, '1e-4', yes]"
    expected = [1e-4, 12e3, -1500.0, 0.5, 1.0, 1000, 10, 16, float("inf"), "2:4", "2026-01-02", "1e2x", "1e-4", True]
    found = load_yaml(text)
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))
