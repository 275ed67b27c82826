"""Studies in which one name stands for two things: two mask sets, two models, weights or rows that change."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.rebuild import rebuild
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.masks.files import load_masks
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.commands import MaskConfig, SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.keep import keep_models
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.runs import Tracker

CALIBRATED = {"importance": "wanda", "scope": "row", "calibration_samples": 4, "calibration_seq_len": 16}


@pytest.fixture
def start(study_file, tmp_path):
    """Runs a study to its end; returns its status, its run and its cells, those recorded for others left out."""

    def run(grid, resume=None, cell=None, **rest):
        values = {"dense_baseline": False, "keep": "none", **rest}
        path = study_file(grid, cell={"score_untuned": False, "perplexity_tokens": 0, **(cell or {})}, **values)
        status = sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"), resume=resume))
        tracker = Tracker()
        parent = [run for run in tracker.search() if run.tags.get("kind") == "study"][-1]
        cells = [run for run in tracker.children(parent.run_id) if run.tags.get("kind") == "cell"]
        return status, parent, cells

    return run


@pytest.fixture
def model(tiny_model, tmp_path):
    """A model of one's own in a folder whose name says nothing."""

    def make(name, change=0.0):
        folder = tmp_path / name / "merged"
        shutil.copytree(tiny_model("tiny-llama"), folder)
        _add(folder, change)
        return folder

    return make


def _add(folder, change):
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        tensors[name] = tensor + change * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _checksums(cells, field):
    return {run.params[f"cfg/{field}"]: run.tags["mask_checksum"] for run in cells}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "cell"),
    [
        ({"task": ["boolq", "hellaswag"]}, CALIBRATED),
        ({"allocation": ["owl", "dlp"]}, CALIBRATED | {"scope": "layer", "sparsity": 0.7}),
        ({"pattern": ["2:4", "1:2"]}, {"method": "semi_structured"}),
        ({"calibration_samples": [2, 8]}, CALIBRATED | {"sparsity": 0.6}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_every_mask_set_has_a_folder_of_its_own(start, axis, cell):
    status, parent, cells = start({"model": ["tiny-llama"], **axis}, cell=cell)
    assert status == 0
    (field,) = axis
    found = _checksums(cells, field)
    assert len(found) == len(set(found.values())) == 2
    status, _, again = start({"model": ["tiny-llama"], **axis}, cell=cell, resume=parent.run_id)
    assert status == 0 and len(again) == len(cells)  # nothing is run again under the other's masks


@pytest.mark.slow
def test_two_models_of_one_last_name_have_their_own_masks(start, model):
    folders = [str(model("a")), str(model("b", 0.5))]
    status, _, cells = start({"model": folders})
    assert status == 0
    for run in cells:
        of = Workbench()
        (file,) = make_masks(MaskConfig(model=run.params["cfg/model"]), of, f"{run.params['cfg/model']}-masks")
        assert run.tags["mask_checksum"] == file.checksum
    assert len(set(_checksums(cells, "model").values())) == 2


def test_one_model_under_two_names_is_one_computation(start, model):
    folders = [str(model("a")), str(model("b"))]
    status, _, cells = start({"model": folders})
    assert status == 0 and Counter("same_as" in run.tags for run in cells) == {False: 1, True: 1}
    assert {run.params["cfg/model"] for run in cells} == set(folders)


@pytest.mark.slow
def test_weights_that_change_under_their_name_are_noticed_by_a_resume(start, model, capsys):
    folder = model("a")
    grid = {"model": [str(folder)], "sparsity": [0.3, 0.5]}
    status, parent, before = start(grid)
    _add(folder, 0.5)
    capsys.readouterr()
    status, again, cells = start(grid, resume=parent.run_id)
    shown = capsys.readouterr().out
    assert status == 0 and again.run_id == parent.run_id
    assert f"behind its name has changed: model {folder}.weights" in shown and "0 of 2 cells are done" in shown
    old = {run.run_id for run in before}
    assert {run.run_id in old: "superseded" in run.tags for run in cells} == {True: True, False: False}
    new = [run for run in cells if run.run_id not in old]
    assert {run.tags["base_fingerprint"] for run in new} == {Checkpoint(folder).fingerprint}
    rows = Tracker().fetch(parent.run_id, "report/summary.csv").read_text().splitlines()
    assert len(rows) == 1 + 2


@pytest.mark.slow
def test_rows_that_change_under_their_name_are_noticed_by_a_resume(start, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(made_data_dir(), data)
    grid, cell = {"model": ["tiny-llama"], "mode": ["dense"]}, {"data_dir": str(data)}
    _, parent, _ = start(grid, cell=cell)
    file = data / "boolq" / "validation.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "answer": not row["answer"]}) + "\n" for row in lines))
    capsys.readouterr()
    status, _, cells = start(grid, cell=cell, resume=parent.run_id)
    assert status == 0 and len(cells) == 2
    assert f"data of boolq ({data}).scored_data" in capsys.readouterr().out


def test_given_masks_are_titled_by_what_made_them(start, tmp_path):
    about = MaskConfig(model="tiny-llama", method="semi_structured", pattern="1:2", importance="magnitude")
    (file,) = make_masks(about, Workbench(), tmp_path / "mine")
    status, _, (run,) = start({"model": ["tiny-llama"], "masks": [str(file.path)]})
    assert status == 0
    assert run.name == "50 % s2s semi_structured magnitude · boolq · tiny-llama"
    described = {name: run.params[f"cfg/{name}"] for name in ("method", "importance", "pattern", "sparsity")}
    assert described == {"method": "semi_structured", "importance": "magnitude", "pattern": "1:2", "sparsity": "0.5"}
    assert run.tags["mask_checksum"] == file.checksum


def test_given_masks_of_other_weights_stop_a_study_before_its_first_run(start, model, tmp_path):
    (file,) = make_masks(MaskConfig(model=str(model("a"))), Workbench(), tmp_path / "mine")
    with pytest.raises(UserError, match="made from other weights"):
        start({"model": [str(model("b", 0.5))], "masks": [str(file.path)]})
    assert not Tracker().search()


@pytest.mark.slow
def test_trials_of_a_search_run_under_the_masks_that_are_given(study_file, tmp_path):
    about = MaskConfig(model="tiny-llama", sparsities=(0.7,))
    (file,) = make_masks(about, Workbench(), tmp_path / "mine")
    search = {"objective": "loss", "trials": 2, "space": {"lora_r": [2, 4]}}
    path = study_file({}, cell={"model": "tiny-llama", "masks": str(file.path)}, search=search)
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    trials = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    assert [run.tags["mask_checksum"] for run in trials] == [file.checksum] * 2
    assert {run.params["cfg/sparsity"] for run in trials} == {"0.7"}
    assert {run.metrics["sparsity/violations"] for run in trials} == {0}


def test_a_mask_file_that_is_replaced_is_not_taken_for_the_one_that_was_made(tmp_path):
    bench = Workbench()
    (made,) = make_masks(MaskConfig(model="tiny-llama", sparsities=(0.5,)), bench, tmp_path / "one")
    (other,) = make_masks(MaskConfig(model="tiny-llama", sparsities=(0.7,)), bench, tmp_path / "two")
    shutil.copy(other.path, made.path)
    assert load_masks(made.path).sparsity == pytest.approx(0.7, abs=1e-3)
    with pytest.raises(UserError, match="it was replaced"):
        made.load()


@pytest.mark.slow
def test_a_refused_rebuild_leaves_nothing_that_a_later_start_could_adopt(start, tmp_path):
    _, parent, (run,) = start({"model": ["tiny-llama"]}, keep="adapter")
    tracker, folder = Tracker(), tmp_path / "study"
    tracker.log(run.run_id, tags={"merged_fingerprint": "0" * 16})
    with pytest.raises(UserError, match="not those of run"):
        rebuild(tracker, run.run_id, tmp_path / "again", Workbench())
    assert not (tmp_path / "again").exists()
    said = []
    for _ in range(2):
        assert keep_models(tracker, parent.run_id, folder, True, Workbench(), False, said=said.append) == []
    assert len(said) == 2 and not list(folder.glob("models/*"))


@pytest.mark.slow
def test_a_folder_that_is_not_the_runs_model_is_not_kept_as_it(start, model, tmp_path):
    _, parent, (run,) = start({"model": ["tiny-llama"]}, keep="adapter")
    tracker, folder = Tracker(), tmp_path / "study"
    (kept,) = keep_models(tracker, parent.run_id, folder, False, Workbench(), False)
    right = Checkpoint(kept).fingerprint
    _add(kept, 0.5)
    (again,) = keep_models(tracker, parent.run_id, folder, False, Workbench(), False)
    assert again == kept and Checkpoint(kept).fingerprint == right == run.tags["merged_fingerprint"]


def test_weights_that_change_while_a_study_runs_stop_its_cells(model, small):
    from sparse_ft.settings.cell import CellConfig

    folder, bench = model("a"), Workbench()
    cell = CellConfig(**small, model=str(folder), mode="dense")
    with bench.borrow(cell):
        pass
    _add(folder, 0.5)
    with pytest.raises(UserError, match="changed while they were in use"), bench.borrow(replace(cell, seed=1)):
        pass
