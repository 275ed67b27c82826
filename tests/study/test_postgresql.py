"""What a team has: an MLflow server over PostgreSQL and S3, and a search whose trials are kept there."""

import boto3
import pytest
from servers import mlflow_server, postgresql_programs, postgresql_server, s3_server

from sparse_ft.commands.rebuild import rebuild
from sparse_ft.settings.commands import RebuildConfig, SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgresql_programs() is None, reason="needs the programs of a PostgreSQL server"),
]


PASSWORD = "correct-horse"


def with_password(address: str) -> str:
    """The same place for somebody with a password, which these servers do not ask for."""
    scheme, _, place = address.partition("://")
    return f"{scheme}://sparse:{PASSWORD}@{place.rpartition('@')[2]}"


def test_two_workers_fill_a_study_and_a_search(study_file, tmp_path, monkeypatch, capfd):
    workers = {"executor": "process", "max_workers": 2, "output_dir": str(tmp_path / "out")}
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "sparsity": [0.3, 0.6]}
    search = {
        "space": space,
        "trials": 4,
        "objective": "accuracy_sparsity",
    }
    options = ["--artifacts-destination", "s3://team/mlflow"]
    with (
        postgresql_server("mlflow", "optuna") as (store, trials),
        s3_server(tmp_path / "s3", "team") as reached,
        mlflow_server(tmp_path, store, *options, environment=reached) as address,
    ):
        address, trials = (with_password(place) for place in (address, trials))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.6], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
        assert sweep(SweepConfig(config=str(study_file(grid)), **workers)) == 0
        found = study_file({}, name="search", cell={"model": "tiny-llama"}, search={**search, "storage": trials})
        assert sweep(SweepConfig(config=str(found), **workers)) == 0
        tracker = Tracker()
        cells = {}
        for study in (run for run in tracker.search() if run.tags.get("kind") == "study"):
            assert study.status == "FINISHED"
            children = tracker.children(study.run_id)
            cells[study.name] = [run for run in children if run.tags["kind"] == "cell"]
            if study.name == "search":
                assert "search/search.png" in tracker.artifacts(study.run_id)
        assert {name: len(runs) for name, runs in cells.items()} == {"small": 5, "search": 4}
        assert {run.status for runs in cells.values() for run in runs} == {"FINISHED"}
        assert {run.tags["trial"] for run in cells["search"]} == {"0", "1", "2", "3"}

        key = {name.lower(): value for name, value in reached.items() if name.startswith("AWS_")}
        s3 = boto3.client("s3", endpoint_url=reached["MLFLOW_S3_ENDPOINT_URL"], **key)
        objects = [entry["Key"] for entry in s3.list_objects_v2(Bucket="team")["Contents"]]
        adapters = [name for name in objects if name.endswith("/adapter/adapter_model.safetensors")]
        assert len(adapters) == 5 + 4 and all(name.startswith("mlflow/") for name in adapters)
        sparse = next(run for run in cells["small"] if run.params["cfg/sparsity"] == "0.6")
        rebuilt = RebuildConfig(run_id=sparse.run_id, output_dir=str(tmp_path / "rebuilt"))
        assert rebuild(rebuilt) == 0  # its adapter and masks came back from there

        written = {name: s3.get_object(Bucket="team", Key=name)["Body"].read() for name in objects}
        written |= {str(file): file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
        written |= {run.run_id: repr(run).encode() for run in tracker.search()}
        secrets = [PASSWORD.encode(), reached["AWS_SECRET_ACCESS_KEY"].encode()]
        assert not [name for name, content in written.items() if any(secret in content for secret in secrets)]
    shown = "".join(capfd.readouterr())
    assert PASSWORD not in shown and "small" in shown
