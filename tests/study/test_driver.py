import json
import re
import shlex
from pathlib import Path

import pytest

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.settings.cell import TrainConfig
from sparse_ft.settings.commands import MaskConfig, SweepConfig
from sparse_ft.settings.parser import Parser
from sparse_ft.study.display import duration
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.runs import Tracker


@pytest.fixture
def run_study(study_file, tmp_path):
    def run(grid, **rest):
        path = study_file(grid, **rest)
        status = sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
        tracker = Tracker()
        (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
        return status, tracker, parent, tracker.children(parent.run_id)

    return run


def _of(children, kind):
    return [run for run in children if run.tags["kind"] == kind]


@pytest.mark.slow
def test_a_study_is_a_parent_with_a_child_for_every_cell_and_mask_set(run_study, capsys, tmp_path):
    grid = {"model": ["tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    status, tracker, parent, children = run_study(grid, figures="summary")
    assert status == 0
    assert {run.status for run in [parent, *children]} == {"FINISHED"}
    cells, masks = _of(children, "cell"), _of(children, "masks")
    assert [run.params["cfg/mode"] for run in cells] == ["dense", "sparse_to_dense", "sparse_to_sparse"]
    assert len(masks) == 1
    names = tracker.artifacts(masks[0].run_id)
    for stem in ("masks_sparsity50_unstructured.safetensors", "stats_sparsity50_unstructured.json"):
        assert f"masks/{stem}" in names
    sparse = cells[-1]
    assert sparse.metrics["sparsity/violations"] == 0
    assert sparse.metrics["sparsity/after_merge"] == sparse.metrics["sparsity/achieved"]
    assert sparse.tags["mask_checksum"] == masks[0].tags["mask_checksum_50"]
    assert "config.yaml" in tracker.artifacts(sparse.run_id)
    assert "adapter/adapter_config.json" in tracker.artifacts(sparse.run_id)
    for run in [parent, *children]:
        assert {"mlflow.user", "mlflow.source.name", "host", "version/torch", "version/sparse_ft"} <= set(run.tags)
    assert "device_name" in sparse.tags and shlex.split(parent.tags["command"])[:2] == ["sparse-ft", "sweep"]
    _, command, *words = shlex.split(sparse.tags["command"])
    again = Parser(TrainConfig).arguments(words)
    assert command == "train" and flatten_config(again.canonical()).items() <= sparse.params.items()
    assert Parser(MaskConfig).arguments(shlex.split(masks[0].tags["command"])[2:]).sparsities == (0.5,)
    assert {run.name for run in tracker.search("dataset.name = 'boolq/train'")} == {cell.name for cell in cells}
    note = parent.tags["mlflow.note.content"].replace("&nbsp;", "")  # MLflow's page sets no space between columns
    assert "| unstructured magnitude | sparse to sparse | 50 | " in note and parent.tags["command"] in note
    assert "`report/report.html`" in note and "`accuracy`" in note
    assert f"accuracy {sparse.metrics['eval/accuracy']:.3f}" in sparse.tags["mlflow.note.content"]
    assert sparse.tags["command"] in sparse.tags["mlflow.note.content"]
    shown = capsys.readouterr().out
    assert "sparse to sparse" in shown
    assert "mlflow ui --backend-store-uri" in shown
    figures = [Path(line.removeprefix("figure: ")) for line in shown.splitlines() if line.startswith("figure: ")]
    assert figures
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in figures)
    (table,) = (tmp_path / "out").rglob("report/table.txt")
    assert table.read_text().strip() and table.read_text().strip() in shown
    assert "report/table.txt" in tracker.artifacts(parent.run_id)


def test_a_level_of_many_digits_is_the_level_that_was_asked(run_study):
    grid = {"model": ["tiny-llama"], "sparsity": [0.123456789], "mode": ["sparse_to_sparse"]}
    status, _, _, children = run_study(grid, dense_baseline=False)
    assert status == 0
    (cell,) = _of(children, "cell")
    assert cell.metrics["sparsity/target"] == 0.123456789
    assert cell.metrics["sparsity/achieved"] == pytest.approx(0.123456789, abs=1e-4)  # of tensors this small


@pytest.mark.slow
def test_curves_have_the_sparsity_as_step_and_stand_apart(run_study, capsys):
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.6], "mode": ["sparse_to_sparse"]}
    _, tracker, parent, children = run_study(grid, dense_baseline=False)
    curves = Tracker(experiment="sparse_ft curves").search()
    assert _of(children, "curve") == [] and {run.parent_run_id for run in curves} == {parent.run_id}
    assert [run.params["cfg/mode"] for run in curves] == ["sparse_to_sparse"]
    by_level = {round(float(run.params["cfg/sparsity"]) * 100): run for run in _of(children, "cell")}
    points = tracker.curve(curves[0].run_id, "eval/accuracy")
    assert points == [(level, by_level[level].metrics["eval/accuracy"]) for level in (30, 60)]
    shown = capsys.readouterr().out
    address = re.search(r"http://127\.0\.0\.1:5000/#/experiments/(\d+)/runs\?viewStateShareKey=(\w+)", shown)
    assert address.groups() == (parent.experiment_id, parent.run_id)
    tags = tracker.client.get_experiment(parent.experiment_id).tags
    saved = tags[f"mlflow.sharedViewState.{parent.run_id}"]
    view, metrics = json.loads(saved), set(_of(children, "cell")[0].metrics)
    assert len(saved) < 4000  # a tag of an experiment holds 5,000
    charts = [chart for chart in view["compareRunCharts"] if chart["metricSectionId"] == "study"]
    drawn = {chart.get("metricKey") or chart["yaxis"]["key"] for chart in charts}
    assert {"eval/perplexity", "eval/accuracy", "train/loss_curve"} <= drawn <= metrics
    sections = [(section["name"], section["display"]) for section in view["compareRunSections"]]
    assert sections[0] == ("The study", True) and {name.split("/")[0] for name in metrics} == {
        n for n, _ in sections[1:]
    }
    assert not any(shown for _, shown in sections[1:])
    assert len(tracker.search(view["searchFilter"])) == 2 and "metrics.`eval/accuracy`" in view["selectedColumns"]


@pytest.mark.slow
def test_a_failed_cell_says_why_and_costs_only_itself(run_study, capsys):
    grid = {"model": ["tiny-llama"], "mode": ["sparse_to_sparse"], "learning_rate": [1e-3, 9.0], "sparsity": [0.5]}
    status, tracker, _, children = run_study(grid, dense_baseline=False, cell={"max_steps": 40, "max_seq_len": 64})
    good, bad = _of(children, "cell")
    if bad.status == "FINISHED":
        pytest.fail("a learning rate of 9 was expected to diverge")
    assert (status, good.status, bad.status) == (1, "FINISHED", "FAILED")
    assert bad.tags["failure_class"] == "non_finite_loss"
    assert "step" in bad.tags["failure_message"]
    assert "NonFiniteLossError" in tracker.fetch_text(bad.run_id, "traceback.txt")
    assert "1 of 2 cells failed" in capsys.readouterr().out
    assert [run.name.rpartition(" · ")[2] for run in (good, bad)] == ["learning_rate 0.001", "learning_rate 9.0"]
    assert good.tags["untuned_measured_by"] == good.name  # not only by what it shares with the other


def test_masks_that_cannot_be_made_fail_their_cells_with_the_reason(run_study, tiny_model, tmp_path):
    base, broken = Checkpoint(tiny_model("tiny-llama")), tmp_path / "broken"
    base_name = base.prunable[0]
    copy_checkpoint(base, broken, lambda name, tensor: tensor * float("nan") if name == base_name else tensor)
    grid = {"model": [str(broken), "tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_sparse"]}
    status, _, _, children = run_study(grid, dense_baseline=False)
    of_broken, of_whole = _of(children, "masks")
    bad, good = _of(children, "cell")
    assert status == 1
    assert (of_broken.status, of_whole.status, bad.status, good.status) == (
        "FAILED", "FINISHED", "FAILED", "FINISHED",
    )  # fmt: skip
    assert base_name in bad.tags["failure_message"]
    assert bad.tags["failure_message"] == of_broken.tags["failure_message"]


def test_all_that_stops_a_study_is_said_at_once_and_nothing_is_logged(study_file, tmp_path):
    grid = {"model": ["./no-model", "tiny-llama"], "task": ["boolq"], "importance": ["wanda", "magnitude"]}
    grid |= {"scope": ["global", "layer"], "method": ["unstructured", "semi_structured"]}
    path = study_file(grid, cell={"data_dir": "./no-data", "pattern": "7:14"})
    with pytest.raises(UserError) as raised:
        sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
    for problem in ("no-model", "no-data", "Wanda", "groups of 14"):
        assert problem in str(raised.value)
    assert Tracker().search() == []
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_plan_and_runs_nothing(study_file, capsys, tmp_path):
    (tmp_path / "mlflow.db").unlink()
    path = study_file({"model": ["tiny-llama"], "sparsity": [0.5, 0.125]})
    assert sweep(SweepConfig(config=str(path), dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert "3 cells, 1 mask sets" in shown
    assert "12.5 %" in shown
    assert "no cell like these was measured yet" in shown
    assert not (tmp_path / "mlflow.db").exists()  # nor makes a store


@pytest.mark.slow
def test_a_dry_run_tells_the_time_from_the_cells_measured(run_study, study_file, capsys):
    _, _, _, children = run_study({"model": ["tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_sparse"]})
    sparse, dense = (
        [run.end_time - run.start_time for run in _of(children, "cell") if run.params["cfg/mode"] == mode]
        for mode in ("sparse_to_sparse", "dense")
    )
    capsys.readouterr()
    grid = {"model": ["tiny-llama", "tiny-mistral"], "sparsity": [0.3, 0.6], "mode": ["sparse_to_sparse"]}
    path = study_file(grid, name="larger")
    assert sweep(SweepConfig(config=str(path), dry_run=True)) == 0
    shown = capsys.readouterr().out
    told = duration(dense[0] + 2 * sparse[0])
    assert f"time: about {told} for 3 cells with 1 worker(s), from 2 measured in this experiment" in shown
    assert "and 3 cells more, of which none alike" in shown  # those of tiny-mistral
