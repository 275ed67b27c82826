"""Recovery on text under the mask, before the task."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.rebuild import rebuild
from sparse_ft.cell.recovery import recovery_examples
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker

RECOVER = {"recover_steps": 3, "recover_batch_size": 2, "recover_seq_len": 32}
TAUGHT = {**RECOVER, "teacher": "dense"}


@pytest.fixture
def run(small, tmp_path):
    def run(bench=None, **values):
        cell, bench = CellConfig(**{"model": "tiny-llama", **small, **values}), bench or Workbench()
        kind = replace(mask_set_of(cell), sparsities=(cell.sparsity,))
        (masks,) = make_masks(kind, bench, tmp_path / "masks")
        folder = tmp_path / cell.key()
        return masks, run_cell(cell, masks, bench, folder), folder

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["sparse_to_sparse", "full"])
def test_zeros_survive_both_stages_and_the_language_comes_back(run, mode, dtype):
    masks, result, folder = run(mode=mode, dtype=dtype, keep="all", sparsity=0.7, **TAUGHT | {"recover_steps": 20})
    assert result.metrics["sparsity/violations"] == 0
    assert result.metrics["sparsity/after_merge"] == masks.load().sparsity
    (recovered,) = (folder / "recovered").glob("*/config.json")
    for checkpoint in (Checkpoint(recovered.parent), Checkpoint(folder / "merged")):
        for name, mask in masks.load().items():
            assert not checkpoint.tensor(name)[~mask].any()
    assert result.metrics["eval/perplexity_recovered"] < result.metrics["eval/perplexity_untuned"]
    assert result.tags["recovered_fingerprint"] == Checkpoint(recovered.parent).fingerprint
    curves = {name: len(points) for name, points in result.series.items() if name.startswith("recover/")}
    assert curves == {f"recover/{part}": 20 for part in ("loss", "ce", "kl", "squarehead")}


@pytest.mark.slow
def test_a_recovered_model_is_trained_once_for_all_that_begin_with_it(run, tmp_path):
    bench = Workbench(shared=tmp_path / "untuned")
    _, first, _ = run(bench, **RECOVER)
    _, other_task_rate, _ = run(bench, learning_rate=1e-2, **RECOVER)
    _, dense_adapter, _ = run(bench, mode="sparse_to_dense", **RECOVER)
    _, taught, _ = run(bench, **TAUGHT)
    _, longer, _ = run(bench, **RECOVER | {"recover_steps": 4})
    made = [result.tags["recovered_fingerprint"] for result in (first, other_task_rate, dense_adapter, taught, longer)]
    assert made[0] == made[1] == made[2] and len(set(made)) == 3
    assert len(list((tmp_path / "recovered").glob("*/config.json"))) == 3
    assert other_task_rate.metrics["eval/loss_recovered"] == first.metrics["eval/loss_recovered"]
    assert other_task_rate.series["recover/loss"] == first.series["recover/loss"]
    assert "time/recover_seconds" in first.metrics and "time/recover_seconds" not in other_task_rate.metrics
    assert dense_adapter.metrics["sparsity/after_merge"] < 0.1  # the dense adapter is on top of it


@pytest.mark.slow
def test_what_is_recovered_does_not_depend_on_the_cell_before(run):
    bench = Workbench()
    run(bench, mode="full", **RECOVER)
    assert run(bench, **RECOVER)[1].tags["recovered_fingerprint"] == run(**RECOVER)[1].tags["recovered_fingerprint"]


@pytest.mark.slow
def test_a_recovered_model_whose_weights_were_changed_is_trained_again(run, tmp_path):
    bench = Workbench(shared=tmp_path / "untuned")
    _, first, _ = run(bench, **RECOVER)
    (file,) = (tmp_path / "recovered").glob("*/model.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    _, again, _ = run(bench, **RECOVER)
    assert again.tags["recovered_fingerprint"] == first.tags["recovered_fingerprint"]
    assert "time/recover_seconds" in again.metrics


def test_settings_of_recovery_matter_where_there_is_one():
    plain, dense = CellConfig(), CellConfig(mode="dense")
    assert replace(plain, recover_seq_len=64, recover_corpus="c4", teacher_kl=3.0).key() == plain.key()
    assert not any(name.startswith(("recover", "teacher")) for name in plain.canonical())
    assert replace(dense, recover_steps=9, teacher="dense").key() == dense.key()
    for mode in ("dense", "pruned"):  # nothing was pruned, or nothing is trained
        cell = replace(plain, mode=mode, recover_steps=9, teacher="dense")
        assert not cell.recovered and not cell.has_teacher
    recovered = replace(plain, recover_steps=9)
    assert recovered.recovered and replace(plain, teacher="dense").has_teacher
    for values in (
        {"recover_seq_len": 64},
        {"recover_corpus": "c4"},
        {"teacher": "dense"},
        {"recover_learning_rate": 1},
    ):
        assert replace(recovered, **values).key() != recovered.key()
    assert replace(recovered, teacher_kl=3.0).key() == recovered.key()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"recover_steps": -1}, "recover_steps is -1; it must be at least 0"),
        (
            {"recover_steps": 1, "recover_corpus": "nowhere.txt"},
            "recover_corpus is 'nowhere.txt'; there is no such file",
        ),
        ({"recover_learning_rate": 0.0}, "recover_learning_rate is 0.0"),
        ({"teacher_kl": -1.0}, "teacher_kl is -1.0; it must be at least 0"),
        ({"teacher": "dense", "teacher_ce": 0.0, "teacher_kl": 0.0, "teacher_squarehead": 0.0}, "nothing is left"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"teacher": "dense", "gradient_checkpointing": "reentrant"}, "reentrant hides the blocks' outputs"),
    ],
)
def test_what_makes_no_sense_is_one_line(values, said):
    with pytest.raises(UserError, match=said):
        CellConfig(**values).check()


def test_windows_of_the_tasks_texts_come_again_where_the_text_ends(tmp_path, small):
    cell = CellConfig(**{"model": "tiny-llama", **small, "recover_steps": 2000, "recover_batch_size": 8})
    bench = Workbench()
    windows = recovery_examples(replace(cell, recover_seq_len=64), bench)
    assert (
        len(windows) == 16_000
        and {len(w.input_ids) for w in windows} == {64}
        and {w.answer_start for w in windows} == {1}
    )
    first = next(n for n in range(1, len(windows)) if windows[n] == windows[0])
    assert windows[first : first + 5] == windows[:5]
    text = tmp_path / "book.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{number} rivers run to the sea. " * 30}) + "\n" for number in range(9))
    )
    drawn = recovery_examples(replace(cell, recover_steps=2, recover_corpus=str(text), recover_seq_len=16), bench)
    assert len(drawn) == 16 and len({tuple(w.input_ids) for w in drawn}) > 8


@pytest.mark.slow
def test_a_study_recovers_tells_and_rebuilds(study_file, tmp_path, capsys):
    grid = {
        "model": ["tiny-llama"],
        "sparsity": [0.5],
        "mode": ["sparse_to_sparse", "full"],
        "learning_rate": [1e-3, 1e-4],
    }
    path = study_file(grid, cell=TAUGHT | {"recover_corpus": "task"})
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    assert "recovered" in capsys.readouterr().out
    tracker = Tracker()
    cells = [run for run in tracker.search() if run.tags.get("kind") == "cell"]
    sparse = [run for run in cells if run.params["cfg/mode"] != "dense"]
    assert len({run.tags["recovered_fingerprint"] for run in sparse}) == 2 and len(sparse) == 4
    adapted = next(run for run in sparse if run.params["cfg/mode"] == "sparse_to_sparse")
    again = rebuild(tracker, adapted.run_id, tmp_path / "again", Workbench())
    assert Checkpoint(again).fingerprint == adapted.tags["merged_fingerprint"]
    dense = next(run for run in cells if run.params["cfg/mode"] == "dense")
    assert not any("recovered" in name for name in dense.metrics) and torch.isfinite(
        torch.tensor(adapted.metrics["eval/loss_recovered"])
    )
