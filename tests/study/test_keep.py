import hashlib
from pathlib import Path

import earlier
import pytest

from sparse_ft.cell.rebuild import logged_cell, not_of, rebuild
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.folder import is_packed
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.keep import keep_models, pareto_front
from sparse_ft.tracking.models import resolve_model
from sparse_ft.tracking.record import Run
from sparse_ft.tracking.runs import Tracker


def _bytes(folder):
    """Digest of every tensor of a checkpoint."""
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    return {name: hashlib.sha256(checkpoint.raw(name).tobytes()).hexdigest() for name in checkpoint.names}


def _cells(tracker):
    (parent,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
    return parent, [run for run in tracker.children(parent.run_id) if run.tags["kind"] == "cell"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rebuilt_model_is_the_merged_one_bit_for_bit(study_file, tmp_path, dtype):
    grid = {"model": ["tiny-llama"], "sparsity": [0.6], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    path = study_file(grid, keep="all", cell={"dtype": dtype, "learning_rate": 1e-2})
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    _, cells = _cells(tracker)
    assert len(cells) == 3
    for run in cells:
        target = rebuild(tracker, run.run_id, tmp_path / run.run_id, Workbench())
        assert _bytes(target) == _bytes(run.tags["model_folder"]), run.name
    # Without the study's folder the masks come out of the artifacts.
    (tmp_path / "out").rename(tmp_path / "moved")
    again = rebuild(tracker, cells[-1].run_id, tmp_path / "again", Workbench())
    assert _bytes(again) == _bytes(target)


@pytest.mark.slow
def test_models_are_kept_packed_rebuilt_and_registered_plain(study_file, tmp_path):
    grid = {"model": ["tiny-llama"], "sparsity": [0.6], "mode": ["sparse_to_dense", "full"]}
    path = study_file(grid, keep="all", keep_format="packed", cell={"dtype": "bfloat16"}, dense_baseline=False)
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    parent, cells = _cells(tracker)
    for run in cells:
        kept, full = run.tags["model_folder"], run.params["cfg/mode"] == "full"
        assert is_packed(kept) == full
        if full:  # it has no adapter
            target = rebuild(tracker, run.run_id, tmp_path / run.run_id, Workbench())
            assert not_of(run, Path(kept)) is None and _bytes(target) == _bytes(open_checkpoint(kept))
    folder = Path(parent.folder)
    assert len(keep_models(tracker, parent.run_id, folder, True, Workbench(), False)) == 2
    for run in cells:
        address = tracker.run(run.run_id).tags["registered_as"]
        assert not_of(run, resolve_model(f"models:/{address}")) is None
    assert not is_packed(resolve_model(f"models:/{address}"))


def test_a_model_of_the_front_is_packed_when_it_is_made_again(study_file, tmp_path):
    path = study_file({"model": ["tiny-llama"], "sparsity": [0.6]}, keep_format="packed", dense_baseline=False)
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    (run,) = _cells(Tracker())[1]
    assert is_packed(run.tags["model_folder"]) and not_of(run, Path(run.tags["model_folder"])) is None


def test_a_run_of_before_there_was_a_choice_of_rounding_is_rebuilt_as_it_was_made(tmp_path):
    tracker = Tracker()
    for values, expected in (({"mode": "dense"}, "nearest"), ({"mode": "dense", "rounding": "dithered"}, "dithered")):
        run_id = tracker.start("a cell", {"kind": "cell"})
        with tracker.ending(run_id):
            tracker.log_dict(run_id, values, "config.yaml")
        assert logged_cell(tracker, tracker.run(run_id)).rounding == expected


@pytest.mark.slow
def test_a_cell_of_version_0_1_0_is_rebuilt_bit_for_bit(study_file, tmp_path):
    """Its fingerprints saw less of the weights, and it rounded to the nearest."""
    path = study_file(
        {"model": ["tiny-llama"], "sparsity": [0.6], "mode": ["sparse_to_dense", "sparse_to_sparse"]},
        keep="all",
        cell={"dtype": "bfloat16", "learning_rate": 1e-2, "rounding": "nearest"},
    )
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    base = Workbench().checkpoint("tiny-llama")
    for run in _cells(tracker)[1]:
        merged = Checkpoint(run.tags["model_folder"])
        tags = {"base_fingerprint": earlier.fingerprint(base), "merged_fingerprint": earlier.fingerprint(merged)}
        tracker.log(run.run_id, tags=tags)
        target = rebuild(tracker, run.run_id, tmp_path / run.run_id, Workbench())
        assert _bytes(target) == _bytes(merged.folder), run.name
    tracker.log(run.run_id, tags={"base_fingerprint": earlier.fingerprint(merged)})
    with pytest.raises(UserError, match="has other weights now"):
        rebuild(tracker, run.run_id, tmp_path / "other", Workbench())


@pytest.mark.slow
def test_of_a_study_the_front_is_kept_whole_and_registered_where_asked(study_file, tmp_path):
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.9], "mode": ["sparse_to_sparse"]}
    path = study_file(grid, register=True)
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    _, cells = _cells(tracker)
    front = {run.run_id for run in pareto_front(cells)}
    assert front
    for run in cells:
        assert ("registered_as" in run.tags) == (run.run_id in front)
        assert any(name.startswith("adapter/") for name in tracker.artifacts(run.run_id))
        for made in tracker.client.get_run(run.run_id).outputs.model_outputs:
            model = tracker.client.get_logged_model(made.model_id)
            scores = {metric.key: metric for metric in model.metrics}
            assert scores["eval/accuracy"].value == run.metrics["eval/accuracy"]
            assert scores["eval/accuracy"].dataset_digest == run.params["identity/scored_data"]
            assert scores["sparsity/violations"].value == 0 and "eval/accuracy_untuned" not in scores
            assert model.params["sparsity"] == run.params["cfg/sparsity"]
            assert model.tags.get("mask_checksum") == run.tags.get("mask_checksum")
            assert model.tags["base_fingerprint"] == run.tags["base_fingerprint"]
    assert not list((tmp_path / "out").glob("*/models/*"))  # the registry holds the only copy


@pytest.mark.slow
def test_nothing_is_rebuilt_from_a_run_that_holds_no_adapter(study_file, tmp_path):
    path = study_file({"model": ["tiny-llama"], "mode": ["dense"]}, keep="none")
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    tracker = Tracker()
    parent, (cell,) = _cells(tracker)
    with pytest.raises(UserError, match="holds no adapter"):
        rebuild(tracker, cell.run_id, tmp_path / "x", Workbench())
    with pytest.raises(UserError, match="no finished cell"):
        rebuild(tracker, parent.run_id, tmp_path / "x", Workbench())
    assert not (tmp_path / "x").exists()


def test_the_front_holds_what_nothing_beats_in_both():
    def run(sparsity, accuracy):
        return Run("cell", metrics={"sparsity/after_merge": sparsity, "eval/accuracy": accuracy})

    points = [(0.0, 0.9), (0.5, 0.8), (0.5, 0.7), (0.6, 0.8), (0.9, 0.2), (0.3, 0.85), (0.2, 0.85)]
    front = pareto_front([run(*point) for point in points] + [Run("not scored")])
    found = [tuple(item.metrics.values()) for item in front]
    assert found == [(0.9, 0.2), (0.6, 0.8), (0.3, 0.85), (0.0, 0.9)]
