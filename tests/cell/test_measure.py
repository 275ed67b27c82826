"""Every form that there is, in bytes and tokens per second that were measured; the others absent, with the reason."""

import json

import pytest
import torch

from sparse_ft import cli
from sparse_ft.cell.measure import FORMS, measure_forms
from sparse_ft.errors import UserError
from sparse_ft.evaluation.speed import held_bytes, measure_speed
from sparse_ft.masks.files import save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.models.packing import pack_checkpoint
from sparse_ft.pruning import MaskGenerator, PruningSettings
from sparse_ft.settings.commands import MeasureSettings
from sparse_ft.tracking.runs import Tracker

QUICK = MeasureSettings(prompt_tokens=6, new_tokens=2, repeats=1, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def structured(tiny_model, tmp_path_factory):
    settings = PruningSettings(method="structured", sparsities=(0.5,), dtype="float32")
    out = tmp_path_factory.mktemp("structured")
    return MaskGenerator(tiny_model("tiny-llama"), settings).generate(out, figures="none")[0].load()


def test_structured_masks_have_a_smaller_form_and_all_numbers(tiny_model, structured, tmp_path):
    found = measure_forms(tiny_model("tiny-llama"), structured, QUICK, tmp_path)
    forms = {form.name: form for form in found.forms}
    assert set(forms) == set(FORMS) - {"semi_structured"} and "CUDA" in found.absent["semi_structured"]
    assert forms["shrunk"].disk < forms["masked"].disk and forms["shrunk"].memory < forms["masked"].memory
    assert forms["masked"].memory == forms["dense"].memory and forms["packed"].memory is None
    kept = pack_checkpoint(tmp_path / "masked", structured, tmp_path / "again").files[0]
    assert forms["packed"].disk == kept.stat().st_size < forms["masked"].disk
    for name in ("dense", "masked", "shrunk"):
        assert [speed.batch for speed in forms[name].speeds] == [1, 8]
        assert all(speed.prefill > 0 and speed.decoding > 0 for speed in forms[name].speeds)
    metrics = found.metrics()
    assert metrics["measure/packed/disk_bytes"] == forms["packed"].disk
    assert metrics["measure/shrunk/decoding_tokens_per_second_batch_8"] == forms["shrunk"].speeds[1].decoding
    assert "measure/packed/memory_bytes" not in metrics
    assert found.protocol["threads"] == torch.get_num_threads() and found.protocol["repeats"] == 1
    # A checkpoint that is masked already is no dense model, and masks of single weights leave nothing smaller.
    again = measure_forms(tmp_path / "masked", structured, QUICK, tmp_path / "second")
    assert "dense" in again.absent and again.forms[0].name == "masked"


def test_what_cannot_be_is_absent_or_said(tiny_model, tmp_path):
    folder = tiny_model("tiny-llama")
    single = MaskSet.from_bool(
        {name: torch.rand(shape) < 0.5 for name, shape in Checkpoint(folder).prunable_shapes().items()}
    )
    found = measure_forms(folder, single, QUICK, tmp_path)
    assert "not structured" in found.absent["shrunk"] and [form.name for form in found.forms] == [
        "dense", "masked", "packed",
    ]  # fmt: skip
    with pytest.raises(UserError, match="reads no more than"):
        measure_forms(folder, single, MeasureSettings(prompt_tokens=10**6), tmp_path)


def test_bytes_are_those_of_the_tensors_tied_ones_once(tiny_model):
    model = load_model(tiny_model("tiny-llama"), "bfloat16", "cpu")
    tied = {id(p): p.nbytes for p in (*model.parameters(), *model.buffers())}
    assert held_bytes(model) == sum(tied.values())
    speed = measure_speed(model, 2, 4, 1, 1)
    assert speed.batch == 2 and speed.prefill > 0 and speed.decoding > 0


@pytest.mark.usefixtures("made_store")
def test_the_command_logs_a_run_and_prints_every_form(tiny_model, structured, tmp_path, capsys):
    file, report = save_masks(structured, tmp_path / "masks.safetensors"), tmp_path / "report.json"
    words = ["--checkpoint", str(tiny_model("tiny-llama")), "--masks", str(file), "--prompt_tokens", "4"]
    words += ["--new_tokens", "1", "--repeats", "1", "--device", "cpu", "--report", str(report)]
    assert cli.run("measure", words, "x") == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}" in shown for name in FORMS)
    (run,) = [run for run in Tracker().search() if run.kind == "measurement"]
    assert run.metrics["measure/shrunk/disk_bytes"] == json.loads(report.read_text())["forms"][2]["disk"]
    assert run.params["protocol/new_tokens"] == "1"
    assert cli.run("measure", [*words, "--repeats", "0"], "x") == 2
