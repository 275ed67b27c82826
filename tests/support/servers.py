"""Servers for tests: of MLflow, of PostgreSQL, and of what Amazon calls S3."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def mlflow_server(
    folder: Path, store: str, *options: str, environment: dict[str, str] | None = None, port: int | None = None
) -> Iterator[str]:
    """The address of a server that hands out and takes artifacts itself, by default in ``folder``; it is killed at the
    end, and can be started again at its old ``port``."""
    port = port or _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", f"{folder}/artifacts", *options]
    address = f"http://127.0.0.1:{port}"

    def answers() -> None:
        urllib.request.urlopen(f"{address}/health", timeout=2).close()

    with _running(command, folder, answers, environment):
        yield address


@contextmanager
def model_server(folder: Path, uri: str, store: str) -> Iterator[str]:
    """The address at which ``mlflow models serve`` answers for a model of a store."""
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    address = f"http://127.0.0.1:{port}"

    def answers() -> None:
        urllib.request.urlopen(f"{address}/ping", timeout=2).close()

    environment = {"MLFLOW_TRACKING_URI": store}
    with _running([*command, "--host", "127.0.0.1", "--port", str(port)], folder, answers, environment):
        yield address


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """What MLflow's environment must say to reach a new S3 server with this bucket."""
    import boto3

    port = _free_port()
    folder.mkdir()
    address = f"http://127.0.0.1:{port}"
    key = {"aws_access_key_id": "sparse", "aws_secret_access_key": "battery-staple"}
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **key)

    def answers() -> None:
        urllib.request.urlopen(address, timeout=2).close()

    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder, answers):
        client.create_bucket(Bucket=bucket)
        yield {"MLFLOW_S3_ENDPOINT_URL": address} | {name.upper(): value for name, value in key.items()}


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
def _running(
    command: list[str], folder: Path, answers: Callable[[], None], environment: dict[str, str] | None = None
) -> Iterator[None]:
    # As in an activated environment, in which the tests need not run: mlflow starts the server of a model by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    around = {**os.environ, "PATH": path, **(environment or {})}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=around, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                answers()
                assert process.poll() is None, f"another server answers: {(folder / 'log.txt').read_text()}"
                break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.5)
        else:
            raise AssertionError((folder / "log.txt").read_text())
        yield
    finally:
        with suppress(ProcessLookupError):  # it ended by itself, and the log says why
            os.killpg(process.pid, signal.SIGKILL)  # a group of its own: the server and its workers
        process.wait()


def _free_port() -> int:
    """A port on which nobody listens, of those that the system gives to no connection by itself before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # random's numbers are the same in each of the processes of xdist
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
