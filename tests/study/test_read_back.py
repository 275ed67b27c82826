"""What an MLflow user looks for, read back from each kind of store: a file, a server, a PostgreSQL server."""

import json

import pandas as pd
import pytest
from servers import postgresql_programs, postgresql_server

from sparse_ft.commands.analyze import analyze
from sparse_ft.settings.commands import AnalyzeConfig, SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker

POSTGRESQL = pytest.mark.skipif(postgresql_programs() is None, reason="needs the programs of a PostgreSQL server")
PLACES = ["sqlite", pytest.param("server", marks=pytest.mark.slow)]
PLACES += [pytest.param("postgresql", marks=[pytest.mark.slow, POSTGRESQL])]


@pytest.fixture(params=PLACES)
def store(request, tmp_path, monkeypatch):
    """The address of a store of each kind."""
    if request.param == "postgresql":
        with postgresql_server("mlflow") as (address,):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            yield address
        return
    address = f"sqlite:///{tmp_path}/mlflow.db" if request.param == "sqlite" else request.getfixturevalue("server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"read back from {request.param}")
    yield address


@pytest.fixture
def read(store, study_file, tmp_path):
    """The tracker of the store, and in it a study and its cells at 50 and 62.5 %."""
    cell = {"keep_samples": True, "score": ["hellaswag"], "importance": "wanda", "scope": "row", "num_fewshot": 1}
    cell |= {"calibration_samples": 4, "calibration_seq_len": 64}
    grid = {"model": ["tiny-llama"], "sparsity": [0.5, 0.625], "mode": ["sparse_to_sparse"]}
    path = study_file(grid, cell=cell, register=True, keep="all", dense_baseline=False)
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    (study,) = [run for run in tracker.search() if run.kind == "study"]
    half, sparse = [run for run in tracker.children(study.run_id) if run.kind == "cell"]
    return tracker, study, half, sparse


@pytest.mark.slow
def test_everything_stands_where_an_mlflow_user_looks_for_it(read, tmp_path):
    tracker, study, half, sparse = read
    client = tracker.client

    # Datasets, with digest, schema, source, rows and context.
    inputs = client.get_run(sparse.run_id).inputs.dataset_inputs
    data = {item.dataset.name: (item.dataset, item.tags[0].value) for item in inputs}
    assert {name: context for name, (_, context) in data.items()} == {
        "boolq/train": "training, few-shot, calibration",
        "boolq/validation": "evaluation, perplexity",
        "hellaswag/validation": "scored beside",
    }
    for dataset, _ in data.values():
        assert json.loads(dataset.profile)["num_rows"] > 0 and json.loads(dataset.schema)["mlflow_colspec"]
        assert json.loads(dataset.source)["uri"].endswith(".jsonl") and dataset.source_type == "local"
    assert data["boolq/train"][0].digest == sparse.params["identity/training_data"]
    assert data["boolq/validation"][0].digest == sparse.params["identity/scored_data"]
    found = tracker.search("dataset.name = 'hellaswag/validation'", study.experiment_id)
    assert {run.run_id for run in found} == {half.run_id, sparse.run_id}

    # Who, which source, with which versions, and how to do it again: children too.
    said = {"mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit", "host", "command"}
    said |= {f"version/{name}" for name in ("torch", "transformers", "peft", "lm_eval", "sparse_ft")}
    for run in (study, half, sparse):
        assert said <= set(run.tags) and run.tags["mlflow.user"] != "unknown"
    assert sparse.tags["mlflow.source.git.commit"] in sparse.tags["version/sparse_ft"]

    # Notes: of the study, of a cell, of the experiment.
    note = study.tags["mlflow.note.content"]
    assert (
        "BoolQ on tiny-llama" in note
        and "| unstructured wanda&nbsp;&nbsp; |" in note
        and "`report/report.html`" in note
    )
    assert sparse.tags["command"] in sparse.tags["mlflow.note.content"]
    assert f"accuracy {sparse.metrics['eval/accuracy']:.3f}" in sparse.tags["mlflow.note.content"]
    experiment = client.get_experiment(study.experiment_id)
    assert "How to read the table" in experiment.tags["mlflow.note.content"]

    # Curves: out of the way, with their points, 62.5 % at its place.
    curves = tracker.search(experiment_id=tracker.experiment(f"{experiment.name} curves"))
    (line,) = [run for run in curves if run.parent_run_id == study.run_id]
    assert line.kind == "curve" and line.tags["steps"] == "tenths of a percent"
    points = [(500, half.metrics["eval/accuracy"]), (625, sparse.metrics["eval/accuracy"])]
    assert tracker.curve(line.run_id, "eval/accuracy") == points

    # The model: what it is, and its scores on what they were measured on.
    version = client.get_model_version_by_alias("tiny-llama-boolq-sparse", "sparse62_5")
    assert sparse.tags["registered_as"] == f"{version.name}/{version.version}"
    model = client.get_logged_model(client.get_run(sparse.run_id).outputs.model_outputs[0].model_id)
    assert model.params["mode"] == "sparse_to_sparse" and model.params["sparsity"] == "0.625"
    (listed,) = json.loads(model.tags["mlflow.modelVersions"])
    assert (listed["name"], str(listed["version"])) == (version.name, str(version.version))
    assert model.tags["mask_checksum"] == sparse.tags["mask_checksum"]
    assert {"sparsity", "mode", "importance", "base_fingerprint", "merged_fingerprint"} <= set(model.tags)
    scores = {metric.key: metric for metric in model.metrics}
    for metric, name in (
        ("eval/accuracy", "boolq/validation"),
        ("eval/perplexity", "boolq/validation"),
        ("eval/hellaswag/accuracy", "hellaswag/validation"),
    ):
        assert (scores[metric].value, scores[metric].dataset_name) == (sparse.metrics[metric], name)
        assert scores[metric].dataset_digest == data[name][0].digest
    assert scores["sparsity/violations"].dataset_name is None and "eval/accuracy_untuned" not in scores

    # Tables to browse: the study's cells, and what a cell's model answered to each question.
    table = tables(tracker, study, "summary.json")
    assert list(table["name"]) == [half.name, sparse.name]
    assert list(table["accuracy"]) == [run.metrics["eval/accuracy"] for run in (half, sparse)]
    answers = tables(tracker, sparse, "samples/score.json")
    assert answers["acc"].mean() == sparse.metrics["eval/accuracy"]
    assert ((answers["answer"] == answers["right"]) == (answers["acc"] == 1)).all()
    assert len(tables(tracker, sparse, "samples/score.hellaswag.json")) == 4

    # An analysis says it again, and puts nothing below what was there.
    assert analyze(AnalyzeConfig(parent_run_id=study.run_id, output_dir=str(tmp_path / "analysis"))) == 0
    assert tables(tracker, study, "summary.json").equals(table)
    (analysis,) = tracker.search("tags.kind = 'analysis'", study.experiment_id)
    assert len(tables(tracker, analysis, "summary.json")) == 2
    assert "| unstructured wanda&nbsp;&nbsp; |" in analysis.tags["mlflow.note.content"]


def tables(tracker: Tracker, run, name: str) -> pd.DataFrame:
    """A table as mlflow gives it back."""
    return tracker.client.load_table(run.experiment_id, name, run_ids=[run.run_id])
