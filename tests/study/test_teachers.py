"""Studies whose dense baseline teaches their other cells."""

from dataclasses import replace

import pytest

from sparse_ft.cell.masks import read_manifest
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import Study
from sparse_ft.tracking.runs import Tracker

GRID = {"model": ["tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_sparse"]}


def _cells():
    runs = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    return {run.params["cfg/mode"] + " " + run.params.get("cfg/teacher", "none"): run for run in runs}, len(runs)


@pytest.mark.slow
def test_the_dense_baseline_is_made_first_and_teaches(study_file, tmp_path, small, capsys):
    grid = GRID | {"teacher": ["none", "dense", "dense_tuned"]}
    config = SweepConfig(config=str(study_file(grid, keep="none")), output_dir=str(tmp_path / "out"))
    assert sweep(config) == 0
    cells, count = _cells()
    assert count == 4 and len(cells) == 4
    dense, taught = cells["dense none"], cells["sparse_to_sparse dense_tuned"]
    assert dense.start_time == min(run.start_time for run in cells.values())
    assert taught.tags["teacher_fingerprint"] == dense.tags["merged_fingerprint"]
    assert "identity/teacher" not in taught.params  # it differs from seed to seed, as masks do
    merged = {run.tags["merged_fingerprint"] for run in cells.values()}
    assert len(merged) == 4

    parent = Tracker().run(taught.parent_run_id)
    assert sweep(replace(config, resume=parent.run_id)) == 0  # nothing is left to do
    assert "4 of 4 cells are done" in capsys.readouterr().out and _cells()[1] == 4

    # By the name of its run it is the same teacher.
    cell = CellConfig(**{**small, "model": "tiny-llama", "teacher": f"runs:/{dense.run_id}"})
    (manifest,) = (tmp_path / "out").glob("*/masks/*/mask_set.json")
    (masks,) = read_manifest(manifest.parent)
    result = run_cell(cell, masks, Workbench(), tmp_path / "cell")
    assert result.tags["merged_fingerprint"] == taught.tags["merged_fingerprint"]


@pytest.mark.slow
def test_cells_whose_teacher_failed_say_so(study_file, tmp_path, monkeypatch):
    def fails(cell, *arguments, **more):
        if cell.mode == "dense":
            raise ValueError("no such luck")
        return run_cell(cell, *arguments, **more)

    monkeypatch.setattr("sparse_ft.cell.run.run_cell", fails)
    grid = GRID | {"teacher": ["none", "dense_tuned"]}
    config = SweepConfig(config=str(study_file(grid)), output_dir=str(tmp_path / "out"))
    assert sweep(config) == 1
    cells, count = _cells()
    assert count == 3 and cells["sparse_to_sparse none"].is_finished
    said = cells["sparse_to_sparse dense_tuned"].tags["failure_message"]
    assert said.startswith("its teacher, dense · boolq · tiny-llama, failed: ") and "no such luck" in said

    monkeypatch.setattr("sparse_ft.cell.run.run_cell", run_cell)
    parent = cells["dense none"].parent_run_id
    assert sweep(replace(config, resume=parent, retry="bug")) == 0


def test_a_cell_has_the_baseline_of_its_own_seed_and_settings():
    grid = GRID | {"teacher": ["none", "dense_tuned"], "seed": [0, 1], "learning_rate": [1e-4, 1e-3]}
    for baseline in (True, False):
        plan = make_plan(Study("s", grid, keep="none", dense_baseline=baseline))
        assert len(plan.cells) == 4 + 8
        for cell in plan.cells:
            assert (cell.teacher is not None) == (cell.config.teacher == "dense_tuned" and cell.config.pruned)
            if cell.teacher is not None:
                dense = plan.cells[cell.teacher].config
                assert (dense.mode, dense.keep) == ("dense", "adapter")
                assert (dense.seed, dense.learning_rate) == (cell.config.seed, cell.config.learning_rate)
    assert all(cell.teacher is None for cell in make_plan(Study("s", GRID)).cells)


def test_a_search_has_no_baseline_to_learn_from(study_file, tmp_path):
    search = {"trials": 2, "space": {"learning_rate": {"low": 1e-4, "high": 1e-3}}}
    path = study_file({}, cell={"model": "tiny-llama", "teacher": "dense_tuned"}, search=search)
    with pytest.raises(UserError, match="a search has no dense baseline to be its teacher"):
        sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
