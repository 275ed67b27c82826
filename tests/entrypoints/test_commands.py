import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft.cerebras.checkpoint import write_start_checkpoint
from sparse_ft.cli import COMMANDS
from sparse_ft.levels import level_label
from sparse_ft.masks.files import load_masks
from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model
from sparse_ft.pruning import MaskGenerator, PruningSettings
from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def masks(command, tmp_path):
    status, _, _ = command("compute_masks", model="tiny-llama", sparsities="0.5,0.7", output_dir=tmp_path / "masks")
    assert status == 0
    return tmp_path / "masks"


SMALL = {
    "model": "tiny-llama",
    "data_dir": "made",
    "lora_r": 2,
    "max_steps": 2,
    "batch_size": 2,
    "eval_limit": 4,
    "perplexity_tokens": 200,
    "perplexity_seq_len": 50,
}


def test_compute_masks_writes_and_logs_a_file_of_each_kind_per_level(masks):
    for level in (50, 70):
        for stem, ending in (("masks", "safetensors"), ("stats", "json")):
            assert (masks / f"{stem}_sparsity{level}_unstructured.{ending}").is_file()
    tracker = Tracker()
    (run,) = tracker.search()
    assert (run.status, run.params["cfg/sparsities"]) == ("FINISHED", "0.5,0.7")
    assert {"masks/masks_sparsity70_unstructured.safetensors", "masks/summary_unstructured.png"} <= set(
        tracker.artifacts(run.run_id)
    )
    assert tracker.curve(run.run_id, "sparsity/achieved") == [(50, 0.5), (70, 0.7)]


@pytest.fixture
def trained(command, masks, tmp_path):
    file = masks / "masks_sparsity70_unstructured.safetensors"
    status, shown, _ = command("train", **SMALL, masks=file, keep="all", output_dir=tmp_path / "cell")
    assert status == 0
    assert "sparse to sparse" in shown
    return tmp_path / "cell" / "merged", file


def test_validate_says_0_for_a_good_pair_1_for_a_broken_one_2_for_none(command, trained, masks, tmp_path):
    merged, file = trained
    (run,) = [run for run in Tracker().search() if run.tags["kind"] == "cell"]  # described by the masks it was given
    assert (run.params["cfg/sparsity"], run.params["cfg/method"]) == ("0.7", "unstructured")
    assert run.metrics["sparsity/target"] == 0.7

    status, shown, _ = command("validate", checkpoint=merged, masks=file)
    assert (status, "0 violations" in shown) == (0, True)

    weights = load_file(merged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    index = tuple((weights[name] == 0).nonzero()[0].tolist())
    weights[name][index] = 1e-3
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    report = tmp_path / "report.json"
    status, shown, _ = command("validate", checkpoint=merged, masks=file, report=report)
    assert status == 1
    assert name in shown
    written = json.loads(report.read_text())
    assert (written["ok"], written["violations"]) == (False, 1)
    assert {layer["name"]: layer["violations"] for layer in written["per_layer"]}[name] == 1
    assert command("validate", checkpoint=merged, masks=file, tolerance=1e-2)[0] == 0

    runs = [run for run in Tracker().search() if run.tags["kind"] == "validation"]
    assert [run.metrics["sparsity/violations"] for run in runs] == [0, 1, 0]

    for wrong in ({"checkpoint": tmp_path / "none"}, {"masks": tmp_path / "none.safetensors"}):
        status, _, complaint = command("validate", **{"checkpoint": merged, "masks": file, **wrong})
        assert status == 2
        assert "none" in complaint
        assert complaint.strip().count("\n") == 0

    command("compute_masks", model="tiny-mixtral", sparsities="0.5", output_dir=tmp_path / "foreign")
    foreign = tmp_path / "foreign" / "masks_sparsity50_unstructured.safetensors"
    status, _, complaint = command("validate", checkpoint=merged, masks=foreign)
    assert (status, "do not fit" in complaint) == (2, True)


def test_masks_and_validation_read_a_cerebras_checkpoint(command, masks, tmp_path):
    source, file = locate("tiny-llama"), masks / "masks_sparsity70_unstructured.safetensors"
    shutil.copy(source / "config.json", tmp_path)
    for name, given in (("dense", None), ("sparse", load_masks(file))):
        write_start_checkpoint(Checkpoint(source), tmp_path / f"{name}.mdl", given)
    values = {"model": tmp_path / "dense.mdl", "sparsities": "0.5,0.7", "output_dir": tmp_path / "again"}
    assert command("compute_masks", **values)[0] == 0
    assert load_masks(tmp_path / "again" / file.name).checksum == load_masks(file).checksum
    assert command("validate", checkpoint=tmp_path / "sparse.mdl", masks=file)[0] == 0
    status, shown, _ = command("validate", checkpoint=tmp_path / "dense.mdl", masks=file)
    assert status == 1 and "model.layers.0.mlp.down_proj.weight" in shown
    for name in ("compute_masks", "train"):  # what reads text needs a tokenizer
        wanda = {"importance": "wanda", "scope": "row", "output_dir": tmp_path / "w", "data_dir": "made"}
        status, _, complaint = command(name, model=tmp_path / "dense.mdl", **wanda)
        assert status == 2 and "Convert it to a Hugging Face folder" in complaint
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("mode", ["sparse_to_sparse", "full"])
def test_a_store_that_fails_while_it_registers_costs_no_model(command, tmp_path, monkeypatch, mode):
    def away(*_, **__):
        raise MlflowException("no more")

    monkeypatch.setattr(MlflowClient, "create_model_version", away)
    asked = {**SMALL, "sparsity": 0.7, "mode": mode, "register_as": "auto", "output_dir": tmp_path / "cell"}
    assert command("train", **asked)[0] != 0
    adapter, merged = tmp_path / "cell" / "adapter", tmp_path / "cell" / "merged" / "model.safetensors"
    assert (adapter.is_dir(), merged.is_file()) == (mode != "full", mode == "full")  # one of them is left


def test_a_trained_model_is_registered_and_validates_from_the_registry(command, tmp_path):
    status, shown, _ = command("train", **SMALL, sparsity=0.7, register_as="auto", output_dir=tmp_path / "cell")
    assert status == 0
    uri = "models:/tiny-llama-boolq-sparse@sparse70"
    assert f"registered: {uri}" in shown
    file = tmp_path / "cell" / "masks" / "masks_sparsity70_unstructured.safetensors"
    assert command("validate", checkpoint=uri, masks=file)[0] == 0
    assert not (tmp_path / "cell" / "merged").exists()  # the registry has it; the adapter is what is kept


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"importance": "sparsegpt"}, "sparsegpt"),
        ({"importance": "alps", "reconstruct": "block", "reconstruct_epochs": 1}, "alps+block"),
    ],
)
def test_masks_bring_the_weights_they_belong_to(command, tmp_path, how, rule):
    wanted = {"sparsities": "0.5", "calibration_samples": 2, "calibration_seq_len": 32, **how}
    folder = tmp_path / "masks"
    status, _, _ = command("compute_masks", model="tiny-llama", data_dir="made", output_dir=folder, **wanted)
    assert status == 0
    (run,) = [run for run in Tracker().search() if run.tags["kind"] == "masks"]
    assert ("reconstruction_error_50" in run.tags) == ("reconstruct" in how)
    if "reconstruct" in how:
        assert all(after <= before for before, after in json.loads(run.tags["reconstruction_error_50"]))
    file = folder / "masks_sparsity50_unstructured.safetensors"
    cell = {**SMALL, "masks": file, "output_dir": tmp_path / "cell"}
    assert command("train", **cell)[0] == 0
    (run,) = [run for run in Tracker().search() if run.tags["kind"] == "cell"]
    assert "warning" not in run.tags
    assert {name: run.params[f"cfg/{name}"] for name in how} == {name: str(value) for name, value in how.items()}
    assert f"unstructured {rule} " in run.name
    shutil.rmtree(folder / "model_sparsity50_unstructured")
    status, _, complaint = command("train", **cell)
    assert (status, "is gone" in complaint) == (2, True)


def test_structured_masks_come_with_smaller_models(command, tmp_path):
    wanted = {"method": "structured", "sparsities": "0,0.5", "shrink": "true", "output_dir": tmp_path / "masks"}
    status, shown, _ = command("compute_masks", model="tiny-llama", **wanted)
    assert (status, shown.count("smaller checkpoint: ")) == (0, 2)
    ids = torch.arange(3, 20)[None]
    masked = load_model(locate("tiny-llama"), "float32", "cpu")
    apply_masks(masked, load_masks(tmp_path / "masks" / "masks_sparsity50_structured.safetensors"))
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "masks" / "smaller_sparsity50_structured")
    assert smaller.num_parameters() < masked.num_parameters()
    torch.testing.assert_close(smaller(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_analyze_writes_its_own_run_and_curves_only_once(command, tmp_path, study_of_two):
    counts = []
    for _ in range(2):
        status, _, _ = command("analyze", parent_run_id=study_of_two, output_dir=tmp_path / "analysis")
        assert status == 0
        runs = Tracker().search()
        counts.append(len(Tracker(experiment="sparse_ft curves").search()))
    assert counts == [1, 1]
    assert (tmp_path / "analysis" / "summary.csv").is_file()
    analyses = [run for run in runs if run.tags.get("kind") == "analysis"]
    assert len(analyses) == 2
    files = {"report/summary.csv", "report/figures/layer_sparsity.png"}  # the blocks are known from the masks' tags
    assert files <= set(Tracker().artifacts(analyses[0].run_id))


@pytest.fixture
def study_of_two(command, tmp_path):
    path = tmp_path / "study.yaml"
    cell = {key: value for key, value in SMALL.items() if key != "model"}
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.6]}
    path.write_text(
        json.dumps({"grid": grid, "cell": cell, "dense_baseline": False, "figures": "none", "keep": "adapter"})
    )
    assert command("sweep", config=path, output_dir=tmp_path / "out")[0] == 0
    (study,) = [run for run in Tracker().search() if run.tags.get("kind") == "study"]
    return study.run_id


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("compute_masks", {"sparsities": "1.5"}, "between 0 and 1"),
        ("compute_masks", {"method": "thin"}, "method is 'thin'"),
        ("compute_masks", {"model": "tiny-llama", "importance": "wanda", "scope": "global"}, "force"),
        ("compute_masks", {"model": "tiny-llama", "shrink": "true"}, "shrink needs method structured"),
        ("train", {"mode": "thin"}, "mode is 'thin'"),
        ("train", {"model": "./none", "data_dir": "made"}, "none"),
        ("train", {"model": "tiny-llama", "data_dir": "./none"}, "none"),
        ("train", {"model": "tiny-llama", "data_dir": "made", "masks": "none.npz"}, "does not exist"),
        ("train", {"model": "tiny-llama", "data_dir": "made", "lora_r": 0}, "lora_r"),
        ("train", {"model": "tiny-llama", "data_dir": "made", "max_steps": 0}, "max_steps"),
        ("train", {"model": "tiny-llama", "data_dir": "made", "sparsity": 2}, "sparsity"),
        (
            "train",
            {"model": "tiny-llama", "task": "hellaswag", "data_dir": "made", "max_seq_len": 2},
            "max_seq_len is 2",
        ),
        ("train", {"model": "tiny-llama", "data_dir": "made", "device": "cuda:99"}, "cuda:99"),
        ("train", {"model": "tiny-llama", "data_dir": "made", "importance": "taylor"}, "calibration_samples"),
        ("compute_masks", {"model": "tiny-llama", "data_dir": "made", "importance": "taylor"}, "calibration_samples"),
        ("train", {"model": "tiny-llama", "data_dir": "made", "trainer": "wafer"}, "local | cerebras"),
        (
            "train",
            {"model": "tiny-llama", "data_dir": "made", "trainer": "cerebras", "lora_dropout": 0.1},
            "tiny-llama cannot be trained on a Cerebras: lora_dropout",
        ),
        ("train", {"model": "tiny-llama", "data_dir": "made", "trainer": "cerebras"}, "ModelZoo 2.10"),
        ("train", {"trainer": "cerebras", "cerebras": "none.yaml"}, "none.yaml cannot be read"),
        ("analyze", {}, "parent_run_id"),
        ("sweep", {"config": "none.yaml"}, "does not exist"),
        ("sweep", {"config": "none.yaml", "executor": "cerebras"}, "trainer=cerebras"),
    ],
)
def test_wrong_input_is_one_line_status_2_and_no_run(command, name, values, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, complaint = command(name, **values)
    assert status == 2
    assert message in complaint
    assert complaint.count("\n") == 1
    assert complaint.startswith(f"{name}: ")
    assert not (tmp_path / "outputs").exists()
    assert Tracker().search() == []


def test_help_comes_without_loading_torch():
    program = (
        f"import runpy, sys\n"
        f"for name in {list(COMMANDS)}:\n"
        f"    sys.argv = [name, '--help']\n"
        f"    try: runpy.run_module(f'entrypoints.{{name}}', run_name='__main__')\n"
        f"    except SystemExit as stop: assert stop.code in (0, None)\n"
        f"assert not {{'torch', 'mlflow', 'numpy'}} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert [f"usage: python -m entrypoints.{name} " in done.stdout for name in COMMANDS] == [True] * len(COMMANDS)


def mlflow_run(entry_point, folder, **parameters):
    """The real thing: `mlflow run` in a process of its own, started in ``folder``."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    argv = [part for item in parameters.items() for part in ("-P", "=".join(item))]
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry_point, "--env-manager", "local", *argv],
        env=environment,
        cwd=folder,  # where mlflow puts the artifacts of an experiment without a place of its own
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = Tracker(experiment="Default").search()
    assert run.status == "FINISHED"
    return run


@pytest.mark.slow
def test_mlflow_run_makes_one_run_and_keeps_what_was_typed(tmp_path):
    folder = str(tmp_path / "masks")
    run = mlflow_run("compute_masks", tmp_path, model="tiny-llama", sparsities=".50", output_dir=folder, force="false")
    assert (run.params["sparsities"], run.params["cfg/sparsities"]) == (".50", "0.5")
    assert torch.is_tensor(load_file(tmp_path / "masks" / "masks_sparsity50_unstructured.safetensors").popitem()[1])


@pytest.mark.slow
def test_a_folder_of_shards_is_pruned_as_the_one_file(command, tmp_path, tiny_model):
    model = load_model(tiny_model("tiny-mixtral"), "float32", "cpu")
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    values = {"scope": "global", "sparsities": "0:0.9:0.1", "figures": "all", "output_dir": tmp_path / "masks"}
    assert command("compute_masks", model=tmp_path / "model", **values)[0] == 0
    (run,) = Tracker().search()
    model.save_pretrained(tmp_path / "whole")
    settings = PruningSettings(scope="global", sparsities=tuple(level / 10 for level in range(10)))
    whole = MaskGenerator(tmp_path / "whole", settings).generate(tmp_path / "expected", figures="none")
    for file in whole:
        assert run.tags[f"mask_checksum_{level_label(file.sparsity)}"] == file.checksum
        assert load_masks(tmp_path / "masks" / file.path.name).checksum == file.checksum
    artifacts = Tracker().artifacts(run.run_id)
    assert "masks/coverage.json" in artifacts
    assert "masks/heatmap_sparsity90_unstructured.png" in artifacts


def test_what_pruning_had_to_say_is_on_the_run(command, tmp_path):
    wanted = {"importance": "wanda", "scope": "row", "calibration_samples": 1, "calibration_seq_len": 2}
    status, _, shown = command(
        "compute_masks", model="tiny-mixtral", data_dir="made", output_dir=tmp_path / "masks", **wanted
    )
    assert (status, "no calibration token came here" in shown) == (0, True)
    (run,) = Tracker().search()
    assert "no calibration token came here" in run.tags["warning"]
