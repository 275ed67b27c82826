"""Experts of a mixture pruned and the rest fine-tuned, through the steps."""

import json

import pytest

from sparse_ft.cell.rebuild import rebuild
from sparse_ft.cell.workbench import Workbench
from sparse_ft.masks.files import load_masks
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.tracking.runs import Tracker

TEXT = {"data_dir": "made", "calibration_samples": 4, "calibration_seq_len": 32}
SMALL = TEXT | {"model": "tiny-mixtral", "method": "experts", "max_steps": 2, "batch_size": 2, "eval_limit": 4,
                "eval_batch_size": 4, "perplexity_tokens": 256, "perplexity_seq_len": 64, "lora_r": 2}  # fmt: skip


def cells():
    return [run for run in Tracker().search() if run.tags.get("kind") == "cell"]


@pytest.mark.slow
def test_masks_a_smaller_checkpoint_training_from_the_file_and_its_proof(command, tmp_path):
    out = tmp_path / "masks"
    how = {"model": "tiny-mixtral", "method": "experts", "sparsities": "0.25,0.5", "shrink": "true"}
    status, said, err = command("compute_masks", output_dir=out, **how, **TEXT)
    assert status == 0, err
    assert "smaller checkpoint" in said
    small = load_model(out / "smaller_sparsity50_experts", "float32", "cpu")
    assert small.config.num_local_experts == 2 == len(small.model.layers[0].mlp.gate.weight)
    file = out / "masks_sparsity50_experts.safetensors"
    values = {key: value for key, value in SMALL.items() if key != "method"}
    values |= {"recover_steps": 1, "recover_seq_len": 32, "recover_batch_size": 2, "teacher": "dense"}
    status, _, err = command("train", masks=file, keep="all", output_dir=tmp_path / "cell", **values)
    assert status == 0, err
    (cell,) = cells()
    assert cell.params["cfg/importance"] == "reap" and cell.params["cfg/method"] == "experts"
    masks, merged = load_masks(file), tmp_path / "cell" / "merged"
    assert cell.tags["mask_checksum"] == masks.checksum
    assert cell.metrics["sparsity/target"] == 0.5 and cell.metrics["sparsity/violations"] == 0
    assert cell.metrics["sparsity/achieved"] == cell.metrics["sparsity/after_merge"] == masks.sparsity
    assert cell.metrics["train/weights_moved"] > 0.5 and "eval/loss_recovered" in cell.metrics
    assert Checkpoint(merged).config["num_local_experts"] == 2
    assert not (tmp_path / "cell" / "start").exists()
    status, said, _ = command("validate", checkpoint=merged, masks=file)
    assert status == 0, said
    assert command("validate", checkpoint=merged, masks=out / "masks_sparsity25_experts.safetensors")[0] == 2


@pytest.fixture
def study(command, tmp_path):
    path = tmp_path / "study.yaml"
    grid = {"sparsity": [0.5], "mode": ["sparse_to_sparse", "sparse_to_dense", "full", "pruned"]}
    cell = SMALL | {"dtype": "bfloat16", "eval_limit": 2, "perplexity_tokens": 0, "score_untuned": False}
    path.write_text(json.dumps({"grid": grid, "cell": cell, "keep": "all", "dense_baseline": False}))
    status, said, err = command("sweep", config=path, output_dir=tmp_path / "out")
    assert status == 0, said + err
    return path


@pytest.mark.slow
def test_a_study_over_experts_and_its_cells_made_again(study, tmp_path):
    runs = {run.params["cfg/mode"]: run for run in cells()}
    assert len(runs) == 4
    for run in runs.values():
        assert run.status == "FINISHED" and run.metrics["sparsity/violations"] == 0
        assert 0.3 < run.metrics["sparsity/achieved"] < 0.5
    for mode in ("sparse_to_sparse", "sparse_to_dense", "pruned"):
        run = runs[mode]
        target = rebuild(Tracker(), run.run_id, tmp_path / mode, Workbench())
        assert Checkpoint(target).fingerprint == run.tags["merged_fingerprint"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("compute_masks", {"model": "tiny-llama", "sparsities": "0.5"}, "a llama model has no experts"),
        ("compute_masks", {"model": "tiny-mixtral", "sparsities": "0.5,0.75"}, "The largest level is 0.5."),
        ("train", {"model": "tiny-mixtral", "sparsity": "0.75"}, "The largest level is 0.5."),
        ("train", {"model": "tiny-mixtral", "importance": "taylor"}, "Taylor prunes unstructured"),
    ],
)
def test_what_cannot_be_is_one_line_and_makes_no_run(command, tmp_path, name, values, message):
    status, _, err = command(name, output_dir=tmp_path / "o", **TEXT | {"method": "experts"} | values)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists() and not Tracker().search()
