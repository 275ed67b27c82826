"""Who made a run, with what, and where."""

import getpass
import platform
from importlib.metadata import version

import sparse_ft
from sparse_ft.tracking import provenance
from sparse_ft.tracking.runs import Tracker


def test_every_run_says_who_made_it_with_what_and_where():
    tracker = Tracker()
    parent = tracker.start("study")
    for run_id in (parent, tracker.start_child(parent, "cell"), Tracker(tracker.uri).start_child(parent, "other")):
        tags = tracker.run(run_id).tags
        assert tags["mlflow.user"] == getpass.getuser() and tags["mlflow.source.type"] == "LOCAL"
        assert tags["mlflow.source.name"] and tags["host"] == platform.node()
        for name in ("torch", "transformers", "peft", "lm_eval"):
            assert tags[f"version/{name}"] == version(name)
        assert tags["version/sparse_ft"].startswith(sparse_ft.__version__)
        assert tracker.client.get_run(run_id).info.user_id == getpass.getuser()


def test_the_package_names_its_commit(tmp_path, monkeypatch):
    from git import Actor, Repo

    package = tmp_path / "house" / "sparse_ft"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1\n")
    repository, who = Repo.init(package.parent), Actor("a", "a@b.c")
    repository.create_remote("origin", "https://me:secret@example.org/house.git")
    repository.index.add(["sparse_ft/a.py"])
    commit = repository.index.commit("one", author=who, committer=who).hexsha
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    assert provenance._repository() == (commit, False, "https://example.org/house.git")
    (package / "a.py").write_text("2\n")
    assert provenance._repository()[1]
    (package.parent / ".gitignore").write_text(".venv\n")  # an environment in a repository of something else
    monkeypatch.setattr(provenance, "_PACKAGE", package.parent / ".venv" / "sparse_ft")
    (package.parent / ".venv" / "sparse_ft").mkdir(parents=True)
    assert provenance._repository() == (None, False, None)
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    assert provenance._repository() == (None, False, None)


def test_what_mlflow_run_has_said_stays(monkeypatch):
    tracker = Tracker()
    own = {"mlflow.user": "somebody", "mlflow.source.name": "git@x#y", "mlflow.source.type": "PROJECT"}
    made = tracker.client.create_run(tracker.experiment_id, tags=own).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    assert Tracker().start("study", {"kind": "study"}) == made
    tags = tracker.run(made).tags
    assert own.items() <= tags.items() and tags["kind"] == "study" and tags["version/torch"] == version("torch")
