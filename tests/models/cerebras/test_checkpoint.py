"""A .mdl written here from a Hugging Face checkpoint reads as that checkpoint. That ModelZoo's own converter writes
the same file is shown in tests/cerebras/modelzoo."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from sparse_ft.errors import UserError
from sparse_ft.models.cerebras.checkpoint import CerebrasCheckpoint
from sparse_ft.models.cerebras.mdl import write_mdl
from sparse_ft.models.cerebras.names import check_convertible, places
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.opening import open_checkpoint

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "mixtral": MixtralConfig}
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    extra = {"num_local_experts": 3} if request.param == "mixtral" else {"tie_word_embeddings": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](**SHAPE, **extra)).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def interleaved(weight, heads):
    """By the converter's own definition: a head's halves [x, y] become pairs (x0, y0, x1, y1, ...)."""
    size = weight.shape[0] // heads
    rows = [h * size + (i // 2) + (i % 2) * (size // 2) for h in range(heads) for i in range(size)]
    return weight[rows]


def as_mdl(folder, path, prefix=""):
    source = Checkpoint(folder)
    fused = {}
    with write_mdl(path) as writer:
        for name, place in places(source.config).items():
            if name not in source.names:
                continue
            tensor = source.tensor(name)
            if place.expert is not None:
                fused.setdefault(place.name, []).append(tensor)
                continue
            writer.write(prefix + place.name, tensor if place.heads is None else interleaved(tensor, place.heads))
        for name, experts in fused.items():
            writer.write(prefix + name, torch.stack(experts, dim=1))
    return path


@pytest.mark.parametrize("prefix", ["", "model."])
def test_it_reads_as_the_hugging_face_checkpoint(folder, tmp_path, prefix):
    source = Checkpoint(folder)
    path = as_mdl(folder, folder / "weights.mdl", prefix)
    found = open_checkpoint(path)
    assert isinstance(found, CerebrasCheckpoint)
    assert found.names == source.names
    assert found.prunable == source.prunable
    assert found.prunable_shapes() == source.prunable_shapes()
    assert found.fingerprint == source.fingerprint
    for name in source.names:
        assert found.dtype(name) is torch.bfloat16
        assert torch.equal(found.tensor(name), source.tensor(name)), name
        assert np.array_equal(found.raw(name), source.raw(name))
        buffer = np.empty(6, np.uint8)
        with found.reading(name) as read:
            read(buffer, 4)
        assert np.array_equal(buffer, source.raw(name)[4:10])


def test_rows_there_and_back(folder):
    for name, place in places(Checkpoint(folder).config).items():
        weight = torch.randn(32, 5) > 0
        assert torch.equal(place.from_modelzoo(place.to_modelzoo(weight)), weight), name
        if place.heads:
            assert torch.equal(place.to_modelzoo(weight), interleaved(weight, place.heads))


def test_masks_and_validation_take_it_as_they_take_the_folder(folder, tmp_path):
    from sparse_ft.masks.files import load_masks
    from sparse_ft.pruning.generator import MaskGenerator
    from sparse_ft.settings.pruning import PruningSettings
    from sparse_ft.validation import validate_checkpoint

    path = as_mdl(folder, folder / "weights.mdl")
    settings = PruningSettings(method="unstructured", importance="magnitude", scope="global", sparsities=(0.5,))
    written = {}
    for source, out in ((folder, "hf"), (path, "mdl")):
        MaskGenerator(source, settings).generate(tmp_path / out, figures="none")
        (file,) = (tmp_path / out).glob("masks_*.safetensors")
        written[out] = load_masks(file)
    assert written["hf"].checksum == written["mdl"].checksum
    report = validate_checkpoint(path, written["mdl"])
    assert not report.ok
    assert report.violations == validate_checkpoint(folder, written["hf"]).violations > 0


def test_the_architecture_must_be_at_hand(folder, tmp_path):
    path = as_mdl(folder, tmp_path / "away" / "deep" / "weights.mdl")
    with pytest.raises(UserError, match=r"no config\.json"):
        open_checkpoint(path)
    config = json.loads((folder / "config.json").read_text())
    assert CerebrasCheckpoint(path, config).names == Checkpoint(folder).names
    config["num_hidden_layers"] = 3
    with pytest.raises(UserError, match=r"lacks transformer_decoder\.layers\.2"):
        CerebrasCheckpoint(path, config)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt2"}, "no converter"),
        ({"head_dim": 16}, "head_dim 16 times 4 heads"),
        ({"hidden_size": 12, "head_dim": 3}, "odd"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_models_that_the_converter_gets_wrong_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        check_convertible({"model_type": "llama", **SHAPE, **change})
