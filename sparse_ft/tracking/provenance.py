"""Who made a run, with which program and libraries, and where: tags that every run has."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_GIT_REPO_URL, MLFLOW_SOURCE_NAME

import sparse_ft
from sparse_ft.tracking.record import Tag, version_tag
from sparse_ft.tracking.stores import quiet_mlflow

__all__ = ["provenance"]

_LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "mlflow")
_PACKAGE = Path(__file__).resolve().parents[1]
_RAYS_OWN = "default_worker.py"  # the main file of a worker on a Ray cluster says nothing of what it runs


@cache
def provenance() -> dict[str, str]:
    """MLflow's own tags (user, source, commit of the main file), the versions of this program and of the libraries
    whose arithmetic is in a result, and the host. Found out once a process."""
    with quiet_mlflow():
        tags = dict(resolve_tags())
    if Path(tags.get(MLFLOW_SOURCE_NAME, "")).name == _RAYS_OWN:
        tags[MLFLOW_SOURCE_NAME] = sparse_ft.__name__
    commit, changed, address = _repository()
    if commit is not None:  # a command beside the interpreter is in no repository
        tags.setdefault(MLFLOW_GIT_COMMIT, commit)
        if address is not None:
            tags.setdefault(MLFLOW_GIT_REPO_URL, address)
    ours = f" (commit {commit}{', changed' if changed else ''})" if commit is not None else ""
    tags[version_tag("sparse_ft")] = f"{sparse_ft.__version__}{ours}"
    tags[version_tag("python")] = platform.python_version()
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            tags[version_tag(name)] = version(name)
    return tags | {Tag.HOST: platform.node()}


def _repository() -> tuple[str | None, bool, str | None]:
    """The commit that the package is at, whether files were changed since, and where it came from; None: it was
    installed from no repository, or git is not here."""
    try:
        from git import Repo
        from mlflow.utils.git_utils import get_git_repo_url

        repository = Repo(_PACKAGE, search_parent_directories=True)
        if repository.ignored(str(_PACKAGE)):  # of an environment that lies in a repository of something else
            return None, False, None
        return repository.head.commit.hexsha, repository.is_dirty(), get_git_repo_url(str(_PACKAGE))
    except Exception:  # GitPython has a dozen reasons; none of them is one to log nothing
        return None, False, None
