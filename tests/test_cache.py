"""The cache, through the real pip and a local folder of wheels: no network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparse_ft.cache import cache_dir, wheel_file, wheel_files
from sparse_ft.errors import UserError

ONE, TWO = "sft_probe/data/one.jsonl", "sft_probe/two.bin"
MEMBERS = {ONE: b'{"a": 1}\n' * 1000, TWO: bytes(range(256)) * 64}


def make_wheel(folder: Path) -> tuple[Path, str]:
    path = folder / "sft_probe-1.0-py3-none-any.whl"
    info = "sft_probe-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
        metadata = [
            "Metadata-Version: 2.1",
            "Name: sft-probe",
            "Version: 1.0",
            "Requires-Dist: sft-absent",
            "",
        ]
        archive.writestr(f"{info}/METADATA", "\n".join(metadata))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A wheel that pip can find, an empty cache, and no index: pip cannot leave the machine."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    return make_wheel(folder)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_cache_dir_is_the_users_choice_or_the_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b" and cache_dir().is_dir()
    monkeypatch.delenv("SPARSE_FT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tmp_path in cache_dir().parents and "sparse_ft" in str(cache_dir())


def test_cache_dir_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="SPARSE_FT_CACHE"):
        cache_dir()


def test_members_are_extracted_once_and_the_wheel_is_not_kept(wheels, monkeypatch):
    path, digest = wheels
    found = wheel_files("sft-probe", "1.0", digest, list(MEMBERS))
    assert [file.read_bytes() for file in found] == list(MEMBERS.values())
    assert not list(cache_dir().rglob("*.whl")) and not list(cache_dir().glob(".download-*"))
    path.unlink()  # from now on only the cache can answer
    assert wheel_file("sft-probe", "1.0", digest, TWO) == found[1]


def test_a_second_member_is_fetched_beside_the_first(wheels):
    _, digest = wheels
    one = wheel_file("sft-probe", "1.0", digest, ONE)
    before = one.stat().st_mtime_ns
    two = wheel_file("sft-probe", "1.0", digest, TWO)
    assert two.read_bytes() == MEMBERS[TWO]
    assert one.stat().st_mtime_ns == before


def test_wrong_digest_is_refused_and_leaves_nothing(wheels):
    _, digest = wheels
    wrong = "0" * 64
    with pytest.raises(UserError, match=digest) as caught:
        wheel_file("sft-probe", "1.0", wrong, TWO)
    assert wrong in str(caught.value) and "\n" not in str(caught.value)
    assert [name for name in files_of(cache_dir()) if not name.startswith("locks/")] == []


def test_truncated_wheel_is_refused(wheels):
    path, digest = wheels
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError):
        wheel_file("sft-probe", "1.0", digest, TWO)
    assert not [name for name in files_of(cache_dir()) if not name.startswith("locks/")]


def test_half_written_file_is_not_taken_for_a_whole_one(wheels):
    """What a killed extraction leaves is a part file; the name itself must still be fetched."""
    _, digest = wheels
    two = wheel_file("sft-probe", "1.0", digest, TWO)
    two.rename(two.with_name(".two.12345678.part.bin"))
    two.with_name(".two.12345678.part.bin").write_bytes(b"half")
    assert wheel_file("sft-probe", "1.0", digest, TWO).read_bytes() == MEMBERS[TWO]


def test_extraction_that_fails_leaves_no_file_under_the_name(wheels, monkeypatch):
    _, digest = wheels

    def stop_half_way(source, target, length=0):
        target.write(source.read(10))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", stop_half_way)
        with pytest.raises(OSError, match="No space"):
            wheel_file("sft-probe", "1.0", digest, TWO)
    assert not [name for name in files_of(cache_dir()) if not name.startswith("locks/")]
    assert wheel_file("sft-probe", "1.0", digest, TWO).read_bytes() == MEMBERS[TWO]


def test_absent_wheel_says_what_to_do_in_one_line(wheels):
    path, digest = wheels
    path.unlink()
    with pytest.raises(UserError, match=r"sft-probe==1\.0.*PIP_FIND_LINKS") as caught:
        wheel_file("sft-probe", "1.0", digest, TWO)
    assert "\n" not in str(caught.value)


def test_absent_member_is_named(wheels):
    _, digest = wheels
    with pytest.raises(UserError, match="sft_probe/three"):
        wheel_files("sft-probe", "1.0", digest, [TWO, "sft_probe/three"])


def test_two_processes_at_once_both_get_the_whole_file(wheels):
    _, digest = wheels
    code = f"from sparse_ft.cache import wheel_file; print(wheel_file('sft-probe', '1.0', '{digest}', '{ONE}'))"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] and Path(outputs[0]).read_bytes() == MEMBERS[ONE]
