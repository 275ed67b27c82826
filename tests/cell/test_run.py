import json
from dataclasses import replace

import pytest
import torch

from sparse_ft.cell.masks import make_masks, mask_file
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import DataMissingError, ModelUnavailableError, UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import Progress
from sparse_ft.settings.cell import CellConfig, mask_set_of


@pytest.fixture(scope="module")
def bench():
    return Workbench()


@pytest.fixture
def run(bench, small, tmp_path):
    def run(own=None, **values):
        cell = CellConfig(**{"model": "tiny-llama", **small, **values})
        kind = mask_set_of(cell)
        masks = None
        if kind is not None:
            (masks,) = make_masks(replace(kind, sparsities=(cell.sparsity,)), own or bench, tmp_path / "masks")
        folder = tmp_path / cell.key()
        return cell, masks, run_cell(cell, masks, own or bench, folder), folder

    return run


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mistral", "tiny-mixtral"])
@pytest.mark.parametrize("mode", ["sparse_to_sparse", "full"])
def test_modes_that_keep_zeros_keep_every_one(run, model, mode):
    _, masks, result, folder = run(model=model, mode=mode, keep="all")
    assert result.metrics["sparsity/violations"] == 0
    assert result.metrics["sparsity/after_merge"] == masks.load().sparsity
    merged = Checkpoint(folder / "merged")
    for name, mask in masks.load().items():
        assert not merged.tensor(name)[~mask].any()


def test_sparse_to_dense_merges_dense_from_a_sparse_base(run):
    _, masks, result, folder = run(mode="sparse_to_dense", keep="all", learning_rate=1e-2)
    assert result.metrics["sparsity/violations"] == 0  # of the base
    assert result.metrics["sparsity/after_merge"] < 0.05
    assert {"eval/accuracy_remasked", "eval/perplexity_remasked"} <= set(result.metrics)
    merged = Checkpoint(folder / "merged")
    assert any(merged.tensor(name)[~mask].any() for name, mask in masks.load().items())


def test_a_dense_cell_prunes_nothing(run):
    _, masks, result, _ = run(mode="dense")
    assert masks is None
    assert result.metrics["sparsity/achieved"] == result.metrics["sparsity/after_merge"] == 0
    assert "mask_checksum" not in result.tags


def test_every_number_has_its_protocol(run):
    _, masks, result, _ = run(sparsity=0.7)
    expected = {"eval/accuracy", "eval/accuracy_stderr", "eval/loss", "eval/perplexity", "eval/samples_per_second"}
    expected |= {f"{name}_untuned" for name in expected}
    expected |= {"train/loss", "train/tokens_per_second", "train/samples_per_second", "memory/peak_bytes"}
    expected |= {"time/train_seconds", "time/eval_seconds", "time/total_seconds", "sparsity/target"}
    assert expected <= set(result.metrics)
    protocol = {"task_version", "num_fewshot", "limit", "split", "perplexity_seq_len", "perplexity_corpus"}
    protocol |= {"perplexity_tokens", "device", "dtype", "batch_size", "train_batch_size", "train_max_seq_len_seen"}
    assert protocol <= set(result.protocol)
    assert result.tags["mask_checksum"] == masks.checksum
    assert [step for step, _ in result.series["train/loss_curve"]] == [1, 2]
    stages = sum(v for k, v in result.metrics.items() if k.startswith("time/") and k != "time/total_seconds")
    assert stages == pytest.approx(result.metrics["time/total_seconds"], rel=0.05, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mixtral"])
def test_keeping_effective_weights_changes_no_number_and_is_said(run, bench, model, monkeypatch):
    keys, merged, losses, said, lines = set(), set(), set(), {}, []
    monkeypatch.setattr(bench, "progress", Progress())
    bench.progress.say = lines.append
    for choice in ("auto", "always", "never"):
        cell, _, result, _ = run(model=model, dtype="bfloat16", keep_effective=choice)
        keys.add(cell.key())
        merged.add(result.tags["merged_fingerprint"])
        losses.add(str(result.series["train/loss_curve"]))
        said[choice] = result.protocol["train_effective_weights"]
    assert len(keys) == len(merged) == len(losses) == 1
    assert said == {"auto": "kept", "always": "kept", "never": "made again"}  # there is room for a tiny model
    assert [line.startswith("effective weights are kept for backward (keep_effective auto)") for line in lines] == [1]
    assert "train_effective_weights" not in run(mode="dense")[2].protocol


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "forms"), [("sparse_to_dense", {"dense"}), ("sparse_to_sparse", {"masked", "packed"})]
)
def test_what_the_merged_model_takes_is_measured_where_it_is_asked_for(run, mode, forms):
    _, _, result, folder = run(mode=mode, measure=True, sparsity=0.7)
    measured = {name.split("/")[1] for name in result.metrics if name.startswith("measure/")}
    assert measured == forms and result.protocol["measure_prompt_tokens"] == 128
    (report,) = [path for path, place in result.artifacts if place == "measure"]
    absent = json.loads(report.read_text())["absent"]
    assert ("shrunk" in absent) == (mode == "sparse_to_sparse") and not (folder / "measured").exists()


@pytest.mark.slow
def test_a_cell_gives_the_same_numbers_after_others_used_the_model(run, bench):
    def numbers(result):
        return {k: v for k, v in result.metrics.items() if k.startswith(("eval/", "train/loss")) and "second" not in k}

    first = numbers(run(mode="sparse_to_sparse", seed=3)[2])
    run(mode="full", learning_rate=1e-2)
    run(mode="sparse_to_dense", learning_rate=1e-2)
    assert numbers(run(mode="sparse_to_sparse", seed=3)[2]) == first


@pytest.mark.parametrize(("keep", "left"), [("none", set()), ("adapter", {"adapter"}), ("all", {"adapter", "merged"})])
def test_what_stays_on_disk(run, keep, left):
    _, _, result, folder = run(keep=keep)
    assert {path.name for path in folder.iterdir()} == left | {"validation.json"}
    assert (result.merged is not None) == (keep == "all")


def test_masks_of_other_weights_are_refused_or_warned_of_and_of_other_shapes_always_refused(run, bench, tmp_path):
    cell, masks, _, _ = run()
    altered = masks.load()
    altered.metadata["fingerprint"] = "0" * 16
    from sparse_ft.masks.files import save_masks

    path = save_masks(altered, tmp_path / "altered.safetensors")
    with pytest.raises(UserError, match="made from other weights"):
        run_cell(cell, mask_file(path).file, bench, tmp_path / "refused")
    result = run_cell(cell, mask_file(path).file, bench, tmp_path / "other", warn_foreign=True)
    assert "other weights" in result.tags["warning"]
    foreign = save_masks(MaskSet.from_bool({"w": torch.ones(2, 2) > 0}), tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        run_cell(cell, mask_file(foreign).file, bench, tmp_path / "third")


def test_missing_models_and_data_have_classes_of_their_own(run):
    with pytest.raises(ModelUnavailableError):
        run(model="./no-such-model", mode="dense")
    with pytest.raises(DataMissingError):
        run(data_dir="./no-such-folder", mode="dense")


@pytest.mark.slow
def test_what_training_moved_and_what_the_merge_cost_is_logged_for_every_mode(run):
    for mode in ("dense", "sparse_to_dense", "sparse_to_sparse", "full"):
        _, _, result, _ = run(mode=mode, task="hellaswag", learning_rate=1e-2, target_modules=("q_proj", "v_proj"))
        assert 0.5 < result.metrics["train/weights_moved"] <= 1, mode
        assert result.metrics["eval/loss_adapter"] == pytest.approx(result.metrics["eval/loss"], rel=1e-4), mode
        assert result.metrics["eval/loss_stderr_adapter"] > 0 and "warning" not in result.tags


def test_moved_weights_are_counted_among_the_kept_of_the_adapted_tensors(run):
    cell, masks, result, folder = run(dtype="bfloat16", learning_rate=1e-4, target_modules=("q_proj",), keep="all")
    merged, moved, kept = Checkpoint(folder / "merged"), 0, 0
    from sparse_ft.models.catalog import locate

    base = Checkpoint(locate(cell.model))
    for name, mask in masks.load().items():
        if "q_proj" in name:
            moved += int((merged.tensor(name) != base.tensor(name).bfloat16())[mask].sum())
            kept += int(mask.sum())
    assert 0 < moved < kept and result.metrics["train/weights_moved"] == moved / kept


def test_a_cell_whose_weights_did_not_move_says_so(run):
    _, _, result, _ = run(dtype="bfloat16", rounding="nearest", learning_rate=1e-9)
    assert result.metrics["train/weights_moved"] == 0
    assert result.tags["warning"].startswith("no_weight_moved: ")


@pytest.mark.parametrize("mode", ["dense", "sparse_to_dense", "sparse_to_sparse", "full"])
def test_small_steps_in_bfloat16_move_weights_unless_rounded_to_the_nearest(run, mode):
    moved = {
        rounding: run(mode=mode, dtype="bfloat16", rounding=rounding, learning_rate=1e-5, max_steps=3)[2].metrics[
            "train/weights_moved"
        ]
        for rounding in ("dithered", "nearest")
    }
    assert moved["dithered"] > 1.5 * moved["nearest"]


@pytest.mark.parametrize("rule", [{}, {"importance": "sparsegpt", "update": "refit", "calibration_samples": 8}])
def test_a_pruned_cell_is_the_pruned_model_and_scored_as_it_is_before_any_training(run, bench, rule):
    _, masks, result, folder = run(mode="pruned", keep="all", sparsity=0.7, **rule)
    *_, tuned, _ = run(mode="sparse_to_sparse", sparsity=0.7, **rule)
    for name in ("accuracy", "loss", "perplexity"):
        assert result.metrics[f"eval/{name}"] == tuned.metrics[f"eval/{name}_untuned"]
    assert result.metrics["eval/loss"] != tuned.metrics["eval/loss"]
    assert {"task", "perplexity_corpus", "samples"} <= set(result.protocol)
    assert not [name for name in result.metrics if name.startswith("train/") or name.endswith("_untuned")]
    assert result.metrics["sparsity/violations"] == 0
    start = Checkpoint(masks.checkpoint) if masks.checkpoint else bench.checkpoint("tiny-llama")
    written, kept = Checkpoint(folder / "merged"), masks.load()
    for name in start.names:
        expected = start.tensor(name) * kept[name] if name in kept else start.tensor(name)
        assert torch.equal(written.tensor(name), expected)


def test_settings_of_training_make_no_other_cell_of_one_that_trains_nothing():
    pruned = CellConfig(mode="pruned")
    for values in ({"learning_rate": 1e-3}, {"max_steps": 7}, {"lora_r": 2}, {"max_seq_len": 64}, {"batch_size": 1}):
        assert replace(pruned, **values).key() == pruned.key()
    for values in ({"eval_limit": 3}, {"sparsity": 0.3}, {"mode": "full"}, {"seed": 1}):
        assert replace(pruned, **values).key() != pruned.key()


def test_a_pruned_cell_takes_no_speed_over_and_keeps_its_own_answers(run):
    bench = Workbench()
    *_, first, _ = run(bench, mode="pruned")
    *_, second, _ = run(bench, mode="pruned", seed=1)  # the same masks and questions
    assert first.tags["untuned_measured_by"] == second.tags["untuned_measured_by"]
    assert first.metrics["eval/loss"] == second.metrics["eval/loss"]
    assert "eval/samples_per_second" in first.metrics and "eval/samples_per_second" not in second.metrics
    *_, kept, folder = run(bench, mode="pruned", keep_samples=True)
    assert list((folder / "samples").glob("*.jsonl")) and kept.metrics["eval/loss"] == first.metrics["eval/loss"]
