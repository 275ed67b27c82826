import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.models.names import parameter_masks, prunable_names, role, slots


@pytest.fixture(params=["tiny-llama", "tiny-mistral", "tiny-mixtral"])
def checkpoint(request, tiny_model):
    return Checkpoint(tiny_model(request.param))


def test_exactly_the_linear_maps_of_the_blocks_are_prunable(checkpoint):
    blocks = checkpoint.config["num_hidden_layers"]
    experts = checkpoint.config.get("num_local_experts", 0)
    assert len(checkpoint.prunable) == blocks * (4 + (3 * experts if experts else 3))
    rest = set(checkpoint.names) - set(checkpoint.prunable)
    assert all(any(word in name for word in ("embed", "norm", "lm_head", ".gate.")) for name in rest)


def test_every_checkpoint_tensor_is_where_its_slot_says(checkpoint):
    parameters = dict(load_model(checkpoint.folder, torch.float32, "cpu").named_parameters())
    for name, slot in slots(checkpoint.config, checkpoint.prunable).items():
        assert torch.equal(slot.view(parameters[slot.parameter]), checkpoint.tensor(name)), name


def test_masks_of_experts_are_put_together_as_the_model_has_them(checkpoint):
    model = load_model(checkpoint.folder, torch.float32, "cpu")
    masks = {name: checkpoint.tensor(name) > 0 for name in checkpoint.prunable}
    whole = parameter_masks(checkpoint.config, masks)
    for name, mask in whole.items():
        assert torch.equal(mask, model.get_parameter(name) > 0), name
    assert sum(mask.numel() for mask in whole.values()) == sum(mask.numel() for mask in masks.values())


def test_fused_experts_in_a_checkpoint_are_found():
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size": 8}
    attention = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    fused = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert prunable_names(config, attention + fused) == sorted(attention + fused)
    assert slots(config, fused)[fused[0]].index == ()
    with pytest.raises(UserError, match=r"gate_up_proj|down_proj"):
        prunable_names(config, attention + fused[:1])


def test_a_missing_tensor_is_named(checkpoint):
    names = [name for name in checkpoint.names if not name.endswith("layers.0.self_attn.k_proj.weight")]
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.k_proj"):
        prunable_names(checkpoint.config, names)


def test_other_architectures_are_refused():
    with pytest.raises(UserError, match="'gpt2'"):
        prunable_names({"model_type": "gpt2", "num_hidden_layers": 1}, [])


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("llama", "model.layers.3.self_attn.q_proj.weight", (3, "q_proj", "row", None)),
        ("mistral", "model.layers.12.mlp.down_proj.weight", (12, "down_proj", "column", None)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w3.weight", (0, "w3", "row", 7)),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", (0, "gate_up_proj", "row", -1)),
    ],
)
def test_roles(family, name, expected):
    what = role({"model_type": family}, name)
    assert (what.block, what.map.name, what.map.axis, what.expert) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("lm_head.weight", "xmodel.layers.3.self_attn.q_proj.weight", "model.norm.weight"),
        *("model.layers.0.mlp.up_proj.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_names_that_are_not_prunable_have_no_role(name):
    with pytest.raises(ValueError, match="no prunable"):
        role({"model_type": "mixtral"}, name)
