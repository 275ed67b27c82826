"""The device that a name stands for, and the refusal to compute beside a GPU that torch cannot use."""

import pytest
import torch
import yaml

from sparse_ft.cell.failures import classify
from sparse_ft.cli import run
from sparse_ft.errors import UserError
from sparse_ft.masks.files import save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models import devices
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import UnusableGpuError, check_device, resolve_device
from sparse_ft.nvidia import Driver, TorchBuild
from sparse_ft.tracking.runs import Tracker

SAID = r"device: NVIDIA H200 is here \(driver 535\.129\.03, CUDA 12\.2\), but torch 2\.13\.0\+cpu is built without CUDA"
LOUD = {"importance": "wanda", "data_dir": "made", "calibration_samples": 2, "calibration_seq_len": 32}


@pytest.fixture
def driver(monkeypatch):
    """A machine whose driver has a GPU, and a torch without CUDA."""
    monkeypatch.setattr(devices, "nvidia_driver", lambda: Driver("535.129.03", (12, 2), "NVIDIA H200", (9, 0)))
    monkeypatch.setattr(devices, "torch_build", lambda: TorchBuild("2.13.0+cpu", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="abacus"):
        resolve_device("abacus")
    with pytest.raises(UserError, match="cuda:99"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
@pytest.mark.parametrize("asked", [check_device, resolve_device])
def test_a_gpu_that_torch_cannot_use_is_refused(driver, asked, device):
    with pytest.raises(UnusableGpuError, match=SAID) as raised:
        asked(device)
    assert classify(raised.value).kind == "worker_lost"  # on a machine of a cluster: not the cell is to blame


def test_the_cpu_is_a_choice_and_so_is_a_variable_that_hides_every_gpu(driver, monkeypatch):
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_device("auto")
    assert resolve_device("auto").type == "cpu"


def test_what_torch_itself_says_is_passed_on(driver, monkeypatch):
    def init():
        raise RuntimeError("No CUDA GPUs are available\nand more")

    monkeypatch.setattr(devices, "torch_build", lambda: TorchBuild("2.13.0+cu126", (12, 6)))
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    check_device("auto")  # only torch can tell
    with pytest.raises(
        UnusableGpuError, match=r"cannot use it: No CUDA GPUs are available, with CUDA_VISIBLE_DEVICES=7;"
    ):
        resolve_device("auto")


def _words(**flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def _refused(capsys, name, *words):
    status, said = run(name, words, "test"), capsys.readouterr()
    assert status == 2 and said.err.startswith(f"{name}: ") and said.err.count("\n") == 1, said.err
    assert SAID.replace("\\", "") in said.err
    return said


def test_every_command_that_computes_is_refused_before_it_makes_a_run(driver, tiny_model, tmp_path, capsys):
    model = tiny_model("tiny-llama")
    masks = save_masks(MaskSet.all_kept(Checkpoint(model).prunable_shapes()), tmp_path / "masks.npz")
    study = tmp_path / "study.yaml"
    study.write_text(
        yaml.safe_dump({"grid": {"model": ["tiny-llama"], "mode": ["dense"]}, "cell": {"data_dir": "made"}})
    )
    _refused(capsys, "train", *_words(model="tiny-llama", data_dir="made", output_dir=tmp_path / "x"))
    _refused(capsys, "compute_masks", *_words(model=model, output_dir=tmp_path / "y", **LOUD))
    _refused(capsys, "measure", *_words(checkpoint=model, masks=masks))
    _refused(capsys, "sweep", *_words(config=study, output_dir=tmp_path / "z"))
    study.write_text("on_gpu: {grid: {model: [tiny-mistral]}}\n" + study.read_text())
    _refused(capsys, "sweep", *_words(config=study, output_dir=tmp_path / "z"))
    assert not any((tmp_path / name).exists() for name in "xyz")
    assert not Tracker().search()


def test_a_dry_run_says_what_the_start_would(driver, study_file, capsys):
    assert (
        run("sweep", _words(config=study_file({"model": ["tiny-llama"], "mode": ["dense"]}), dry_run=True), "test") == 1
    )
    assert "problem: device: NVIDIA H200 is here" in capsys.readouterr().out


def test_masks_by_weight_alone_are_made_beside_any_gpu(driver, tmp_path, made_store):
    assert run("compute_masks", _words(model="tiny-llama", output_dir=tmp_path / "masks", figures="none"), "test") == 0
