import pytest
import torch
import yaml

from sparse_ft.cerebras.checkpoint import write_start_checkpoint
from sparse_ft.cerebras.convert import to_hugging_face, to_modelzoo
from sparse_ft.cerebras.model_section import converter_config, model_section
from sparse_ft.errors import UserError
from sparse_ft.models.cerebras.mdl import MdlFile
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.opening import open_checkpoint


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_there_and_back_through_modelzoos_converter(kind, models, tmp_path):
    """The converter is the oracle of our own reading: names, interleaved rows, experts."""
    source = Checkpoint(models(kind))
    read = open_checkpoint(to_modelzoo(source.folder, tmp_path / "model.mdl"))
    assert read.names == source.names
    assert read.fingerprint == source.fingerprint
    for name in source.names:
        assert torch.equal(read.tensor(name), source.tensor(name)), name

    back = Checkpoint(to_hugging_face(tmp_path / "model.mdl", source.folder, tmp_path / "back"))
    assert back.names == source.names
    assert back.config == source.config
    assert all(torch.equal(back.tensor(name), source.tensor(name)) for name in source.names)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_a_start_checkpoint_from_the_folder_equals_one_from_the_converted_file(kind, models, tmp_path):
    converted = open_checkpoint(to_modelzoo(models(kind), tmp_path / "model.mdl"))
    for number, source in enumerate((converted, Checkpoint(models(kind)))):
        write_start_checkpoint(source, tmp_path / f"start{number}.mdl")
    one, two = MdlFile(tmp_path / "start0.mdl"), MdlFile(tmp_path / "start1.mdl")
    assert one.entries == two.entries
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.entries)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_model_section_is_the_converters(kind, scaled, models):
    config = dict(Checkpoint(models(kind)).config)
    if scaled:
        config["rope_parameters"] = {
            "rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0,
            "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
    from cerebras.modelzoo.tools.convert_checkpoint import _select_model_and_config_converter

    _, _, converter, index = _select_model_and_config_converter(kind, "hf", "cs-2.9")
    theirs = converter.convert(kind, converter_config(config), index, drop_unmatched_keys=True)["model"]
    assert theirs.pop("norm_first") is True
    assert theirs.pop("use_ff_layer1_dropout") is False
    if kind == "mixtral":
        theirs["moe"]["moe_implementation"] = "optimized"  # the trainer's default has other tensors
    assert yaml.safe_load(yaml.safe_dump(theirs)) == model_section(config)


def test_a_model_that_converts_wrongly_is_refused_before(models):
    config = {**Checkpoint(models("llama")).config, "head_dim": 32}
    with pytest.raises(UserError, match="interleaves the rows of such a model wrongly"):
        model_section(config)
