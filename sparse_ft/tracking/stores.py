"""Where runs are kept: the address of the tracking store, and a quiet way to open it."""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from sparse_ft.errors import UserError, masked

__all__ = [
    "artifact_location",
    "exists",
    "is_model_uri",
    "is_server",
    "project_root",
    "quiet_mlflow",
    "reachable",
    "store_lock",
    "tracking_uri",
    "ui_command",
    "unusable",
]

_SQLITE = "sqlite:///"


def project_root() -> Path:
    """The folder of the project's ``MLproject``; the working directory where the package is installed alone."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "MLproject").is_file() else Path.cwd()


def tracking_uri(uri: str | None = None) -> str:
    """The tracking store's address: given, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the project root.

    A relative sqlite path is made absolute, so that workers with another working directory find it.

    Raises:
        UserError: a scheme-less folder, mlflow's old file store, which holds no registered models.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{project_root() / 'mlflow.db'}"
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).expanduser().absolute()}"
    if urlsplit(uri).scheme in ("", "file"):
        raise UserError(
            f"tracking store '{uri}' is a folder, which mlflow keeps for old runs only; set MLFLOW_TRACKING_URI to "
            "sqlite:///path/mlflow.db or to a server"
        )
    return uri


def exists(uri: str) -> bool:
    """False for a sqlite file that nobody has made yet; of other stores only opening them tells."""
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).is_file()


def is_model_uri(text: str) -> bool:
    """Whether `sparse_ft.tracking.models.resolve_model` is the one to ask: ``models:/NAME@ALIAS``, ``models:/NAME/1``,
    ``runs:/RUN/NAME``."""
    return str(text).startswith(("models:/", "runs:/"))


def is_server(uri: str) -> bool:
    """Whether the store is an mlflow server, which then decides itself where artifacts go."""
    return urlsplit(uri).scheme not in ("sqlite", "postgresql", "mysql", "mssql") and "+" not in urlsplit(uri).scheme


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment's artifacts go: ``mlruns`` beside the database; None where a server decides.

    Explicit, because mlflow would take the working directory of whoever comes first.
    """
    if is_server(uri):
        return None
    root = Path(uri.removeprefix(_SQLITE)).parent if uri.startswith(_SQLITE) else project_root()
    return (root / "mlruns" / experiment.replace("/", "-")).as_uri()


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """One process at a time for a sqlite store: two that make the same tables at once both fail."""
    if not uri.startswith(_SQLITE):
        yield
        return
    database = Path(uri.removeprefix(_SQLITE))
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{database}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write the tracking store {database} ({error.strerror}); set MLFLOW_TRACKING_URI to another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def reachable(uri: str) -> None:
    """Asks an http server whether it answers; mlflow itself would retry for minutes before it gives up.

    Raises:
        UserError: nobody answers.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    try:
        urllib.request.urlopen(f"{_without_user(uri).rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # somebody is there; a proxy may guard this page
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"the tracking server {uri} does not answer ({reason}); start it, or unset MLFLOW_TRACKING_URI to keep "
            "the runs in mlflow.db"
        ) from error


def _without_user(uri: str) -> str:
    """The address as urllib takes it: it knows no ``user:password@``.

    Raises:
        UserError: an address that is none, such as one whose password holds a bare '/'.
    """
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    port = host.rpartition("]")[2].partition(":")[2]
    if not host or (port and not port.isdigit()):
        raise UserError(
            f"tracking store {uri}: no server's address; write '/', '@' and ':' of a password as %2F, %40, %3A, "
            "or leave it to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return parts._replace(netloc=host).geturl()


def unusable(uri: str, error: Exception) -> UserError:
    """What mlflow or its database says about a store, and what to do."""
    reason = str(error).split("\n", 1)[0]
    todo = "set MLFLOW_TRACKING_URI to another"
    if "Invalid Host header" in reason:  # called by a name that the server was not told
        todo = f"start the server with --allowed-hosts {urlsplit(uri).netloc}, or call it by its address"
    return UserError(f"cannot open the tracking store {uri}: {reason}; {todo}")


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Holds back what mlflow tells everyone who opens a new database or saves a model."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def ui_command(uri: str) -> str:
    """The command that shows the runs in a browser; an address with a password is left to the environment."""
    shown = masked(uri)
    if uri.startswith("http"):
        return f"open {shown}"
    return "mlflow ui --backend-store-uri " + (shown if shown == uri else '"$MLFLOW_TRACKING_URI"')
