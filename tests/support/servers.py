"""Servers for tests: of MLflow, and of PostgreSQL."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[str]:
    """The address of a server that hands out and takes artifacts itself."""
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", f"{folder}/artifacts"]
    address = f"http://127.0.0.1:{port}"

    def answers() -> None:
        urllib.request.urlopen(f"{address}/health", timeout=2).close()

    with _running(command, folder, answers):
        yield address


def postgresql_programs() -> Path | None:
    """Where the programs of a PostgreSQL server are; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextmanager
def postgresql_server(*databases: str) -> Iterator[list[str]]:
    """The addresses of these databases of a new server."""
    # Its own user must get there, and not everybody may look into the folders of tests.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    user = []
    if os.getuid() == 0:  # as root it does not run
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    programs, port = postgresql_programs(), _free_port()
    make = [*user, str(programs / "initdb"), "-D", str(folder / "data"), "-U", "sparse", "-A", "trust"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder)
    serve = [*user, str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port)]

    def answers() -> None:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        if subprocess.run(ready, capture_output=True).returncode != 0:
            raise ConnectionRefusedError

    try:
        with _running([*serve, "-k", str(folder)], folder, answers):
            address = ["-h", "127.0.0.1", "-p", str(port), "-U", "sparse"]
            for name in databases:
                subprocess.run([str(programs / "createdb"), *address, name], check=True)
            yield [f"postgresql://sparse@127.0.0.1:{port}/{name}" for name in databases]
    finally:
        shutil.rmtree(folder)


@contextmanager
def _running(command: list[str], folder: Path, answers: Callable[[], None]) -> Iterator[None]:
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                answers()
                break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.5)
        else:
            raise AssertionError((folder / "log.txt").read_text())
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own: the server and its workers
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
