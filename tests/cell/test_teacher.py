"""The teacher: lifted out of the student's base, loaded beside it, or another model."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from sparse_ft.cell.identity import cell_identity, cell_key
from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.teacher import check_teacher
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models import loading
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig, TrainConfig, mask_set_of

TAUGHT = {"teacher": "dense", "score_untuned": False, "perplexity_tokens": 0}


@pytest.fixture
def run(small, tmp_path):
    def run(bench=None, place="", **values):
        cell, bench = CellConfig(**{"model": "tiny-llama", **small, **TAUGHT, **values}), bench or Workbench()
        kind = replace(mask_set_of(cell), sparsities=(cell.sparsity,))
        (masks,) = make_masks(kind, bench, tmp_path / "masks")
        return run_cell(cell, masks, bench, tmp_path / f"{cell.key()}{place}")

    return run


@contextmanager
def _beside(*arguments):
    yield None


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"mode": "sparse_to_sparse", "dtype": "bfloat16"},
        {"mode": "sparse_to_dense", "lora_dropout": 0.1, "target_modules": ("q_proj", "down_proj")},
        {"mode": "sparse_to_sparse", "recover_steps": 2, "recover_batch_size": 2, "recover_seq_len": 32},
        {"mode": "sparse_to_sparse", "gradient_checkpointing": "non_reentrant", "gradient_accumulation": 2},
    ],
    ids=["bfloat16", "dense-adapter", "recovery", "checkpoints"],
)
def test_a_lifted_teacher_and_one_loaded_beside_end_in_the_same_weights(run, monkeypatch, values):
    loads = []
    load = loading.load_model
    monkeypatch.setattr("sparse_ft.cell.teaching.load_model", lambda *a: loads.append(a) or load(*a))
    lifted = run(**values)
    assert not loads
    monkeypatch.setattr("sparse_ft.cell.teaching.whole_base", _beside)
    beside = run(place="-beside", **values)
    assert len(loads) == 1
    assert lifted.tags["merged_fingerprint"] == beside.tags["merged_fingerprint"]
    assert lifted.series == beside.series and lifted.metrics["eval/loss"] == beside.metrics["eval/loss"]
    stage = "recover" if "recover_steps" in values else "train"
    curves = {name: len(points) for name, points in lifted.series.items() if name.startswith(f"{stage}/")}
    loss = "recover/loss" if stage == "recover" else "train/loss_curve"
    assert curves == dict.fromkeys((loss, f"{stage}/ce", f"{stage}/kl", f"{stage}/squarehead"), 2)


@pytest.mark.parametrize(
    ("values", "lifts"),
    [
        ({}, True),
        ({"mode": "sparse_to_dense"}, True),
        ({"importance": "wanda", "scope": "row"}, True),
        ({"mode": "full"}, False),
        ({"importance": "sparsegpt", "scope": "layer"}, False),
        ({"importance": "wanda", "scope": "row", "update": "refit"}, False),
        ({"importance": "wanda", "scope": "row", "reconstruct": "block"}, False),
        ({"method": "experts"}, False),
    ],
)
def test_memory_is_counted_where_the_teacher_is_loaded_beside(values, lifts):
    assert CellConfig(teacher="dense", **values).lifts_masks is lifts
    assert not CellConfig(teacher="none", **values).lifts_masks


def test_where_weights_were_updated_the_teacher_is_loaded_beside(run, monkeypatch):
    loads = []
    load = loading.load_model
    monkeypatch.setattr("sparse_ft.cell.teaching.load_model", lambda *a: loads.append(a) or load(*a))
    for values in ({"mode": "full"}, {"importance": "sparsegpt", "scope": "layer", "calibration_samples": 4}):
        run(**values)
    assert len(loads) == 2


@pytest.fixture
def other(tiny_model, tmp_path):
    """Folder of a model as tiny-llama is, with other weights."""
    folder = shutil.copytree(tiny_model("tiny-llama"), tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_another_model_teaches_and_is_known_by_its_weights(run, other, small):
    result, own = run(teacher=str(other)), run()
    assert result.tags["teacher_fingerprint"] == Checkpoint(other).fingerprint
    assert "teacher_fingerprint" not in own.tags
    assert result.tags["merged_fingerprint"] != own.tags["merged_fingerprint"]
    kl = (result.series["train/kl"], own.series["train/kl"])
    assert kl[0] != kl[1]

    moved = other.rename(other.with_name("moved"))
    keys = set()
    for teacher in (str(moved), str(shutil.copytree(moved, other))):
        cell = CellConfig(**{"model": "tiny-llama", **small, "teacher": teacher})
        identity = cell_identity(cell, Workbench())
        assert identity["teacher"] == Checkpoint(moved).fingerprint
        keys.add(cell_key(cell, identity, "masks"))
    assert len(keys) == 1
    plain = CellConfig(**{"model": "tiny-llama", **small, "teacher": "dense"})
    assert "teacher" not in cell_identity(plain, Workbench())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teacher": "wise"}, "teacher: model 'wise' is neither a folder, nor a hub id"),
        ({"teacher": "tiny-qwen2"}, "teacher tiny-qwen2 has another vocabulary than tiny-llama"),
        ({"teacher": "tiny-mistral"}, r"has 52 hidden channels, tiny-llama 60: .* Set teacher_squarehead to 0"),
        ({"teacher": "runs:/0123"}, "teacher: there (is|are) no runs? "),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(values, said):
    cell = CellConfig(model="tiny-llama", **values)
    cell.check()
    with pytest.raises(UserError, match=said) as refusal:
        check_teacher(cell, Workbench())
    assert "\n" not in str(refusal.value)
    check_teacher(replace(cell, mode="dense"), Workbench())  # it has none


def test_a_model_of_other_blocks_teaches_by_its_logits(run):
    result = run(teacher="tiny-mistral", teacher_squarehead=0.0)
    assert len(result.series["train/kl"]) == 2 and "train/squarehead" not in result.series


@pytest.mark.parametrize("teacher", ["runs:/", "runs:/0123/model", "models:/llama@best"])
def test_an_address_that_is_no_run_of_a_cell_is_said_to_be_none(teacher):
    with pytest.raises(UserError, match="give runs:/ID, the run of a finished cell"):
        CellConfig(teacher=teacher).check()


def test_only_a_study_has_a_dense_baseline_to_learn_from():
    with pytest.raises(UserError, match=r"dense baseline of a study \(sweep\); give the run of one: runs:/ID"):
        TrainConfig(teacher="dense_tuned").check()
    CellConfig(teacher="dense_tuned").check()
