"""From a Hugging Face checkpoint through ModelZoo's own trainer, on a CPU, to a validated Hugging Face checkpoint."""

import re

import pytest
import torch
import yaml

from sparse_ft.cerebras.checkpoint import merge_checkpoint
from sparse_ft.cerebras.convert import to_hugging_face
from sparse_ft.models.cerebras.mdl import MdlFile
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.validation import validate_checkpoint

MODES = ("dense", "sparse_to_dense", "sparse_to_sparse", "full")
CASES = [(kind, mode) for kind in ("llama", "mistral", "mixtral") for mode in MODES]


def trained_logits(config_file, checkpoint, mode, ids):
    """Logits of the model as it was trained: ModelZoo's modules, its LoRA, our masked form, the saved state.

    In double precision: in single, two orders of the same sums differ by up to 1.2e-6 of the largest logit.
    """
    from cerebras.modelzoo.common.utils.model.lora import LoRA_Linear, make_model_lora
    from cerebras.modelzoo.registry import registry

    from sparse_ft.cerebras.modelzoo.callback import MaskedLoRALinear

    init = yaml.safe_load(config_file.read_text())["trainer"]["init"]
    model = registry.get_model_class(init["model"]["name"])(dict(init["model"]))
    callbacks = {name: value for entry in init["callbacks"] for name, value in entry.items()}
    if "Lora" in callbacks:
        model = make_model_lora(model, callbacks["Lora"]["lora_params"])
    file = MdlFile(checkpoint)
    for name in [name for name in file.entries if name.endswith("_mask")]:
        module, _, buffer = name.rpartition(".")
        model.get_submodule(module).register_buffer(buffer, torch.zeros(file.entries[name].shape, dtype=torch.bool))
    if mode == "sparse_to_sparse":
        for module in model.modules():
            if isinstance(module, LoRA_Linear):
                module.__class__ = MaskedLoRALinear
    model.load_state_dict({name: file.read(name) for name in model.state_dict()})
    model.double().eval()
    with torch.no_grad():
        output = model.model(input_ids=ids.int(), attention_mask=torch.ones_like(ids).int())
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(autouse=True)
def without_a_trainer(monkeypatch):
    """ModelZoo's mixture writes summaries on every forward pass, which only its Trainer can take."""
    import importlib

    module = importlib.import_module("cerebras.modelzoo.layers.TransformerDecoder")
    monkeypatch.setattr(module, "summarize_scalar", lambda *_: None)


@pytest.mark.parametrize("kind, mode", CASES)
def test_every_mode_end_to_end(kind, mode, models, data, tmp_path, cszoo, zoo):
    folder = models(kind)
    config_file, masks, plan = zoo.prepare(folder, data, tmp_path, mode)
    log = cszoo("fit", config_file, "--target_device", "CPU")
    losses = [float(value) for value in re.findall(r"Train Device=cpu, Step=\d+, Loss=([\d.]+)", log)]
    assert len(losses) == 5
    assert "Training completed successfully!" in log

    checkpoint = tmp_path / "model_dir" / "checkpoint_5.mdl"
    origin = Checkpoint(folder)
    scaling = None if mode == "full" else plan.lora.scaling
    merged = merge_checkpoint(checkpoint, tmp_path / "merged.mdl", origin.config, mode, masks, scaling)
    result = Checkpoint(to_hugging_face(merged, folder, tmp_path / "merged"))
    assert result.names == origin.names
    changed = [name for name in origin.prunable if not torch.equal(result.tensor(name), origin.tensor(name))]
    assert changed

    base = None if mode == "full" else folder
    if mode in ("sparse_to_sparse", "full"):
        for place in (merged, result.folder):
            report = validate_checkpoint(place, masks, base=base if place is result.folder else None)
            assert report.ok, report.lines()
            assert report.sparsity == masks.sparsity
    if mode == "sparse_to_dense":  # the base is sparse, the merged model is not
        trained = MdlFile(checkpoint)
        assert not any(
            trained.read(n.removesuffix("_mask"))[~trained.read(n)].any() for n in trained.entries if "_mask" in n
        )
        assert validate_checkpoint(result.folder, masks).violations > 0

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(zoo.transformers_config(kind)).eval()
    missing = model.load_state_dict({name: result.tensor(name) for name in result.names}, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.double()
    ids = torch.randint(3, 500, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model(ids).logits
    theirs = trained_logits(config_file, checkpoint, mode, ids)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
    assert losses[-1] < losses[0] + 0.1


def test_the_masks_train_as_plain_pytorch_does(models, data, tmp_path, cszoo, zoo):
    """First loss of every mode = loss of the masked Hugging Face model on the same batch."""
    import h5py
    from transformers import AutoModelForCausalLM

    folder = models("llama")
    config_file, masks, _ = zoo.prepare(folder, data, tmp_path, "sparse_to_sparse", steps=1)
    log = cszoo("fit", config_file, "--target_device", "CPU")
    (loss,) = re.findall(r"Train Device=cpu, Step=1, Loss=([\d.]+)", log)
    model = AutoModelForCausalLM.from_config(zoo.transformers_config("llama"))
    source = Checkpoint(folder)
    model.load_state_dict({n: source.tensor(n) * masks.get(n, 1) for n in source.names}, strict=False)
    model.tie_weights()
    with h5py.File(data / "part0.h5") as file:
        ids, _, labels = torch.from_numpy(file["data"][:4]).long().unbind(1)
    expected = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(expected.item(), abs=1e-4)


def test_other_masks_than_the_checkpoints_are_refused(models, data, tmp_path, cszoo, zoo):
    from sparse_ft.masks.files import save_masks

    config_file, _, _ = zoo.prepare(models("llama"), data, tmp_path, "sparse_to_sparse")
    save_masks(zoo.random_masks(Checkpoint(models("llama")), seed=9), tmp_path / "masks.safetensors")
    log = cszoo("fit", config_file, "--target_device", "CPU", check=False)
    assert "was made with another mask of" in log


def test_modelzoos_own_merge_is_refused(models, data, tmp_path, cszoo, zoo):
    config_file, _, _ = zoo.prepare(models("llama"), data, tmp_path, "sparse_to_sparse")
    config_file.write_text(config_file.read_text().replace("merge_weights: false", "merge_weights: true"))
    log = cszoo("fit", config_file, "--target_device", "CPU", check=False)
    assert "merge_weights must be false" in log
