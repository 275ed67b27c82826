"""Mixtures in either layout: the same tensors, masks and checksums; and what is never pruned."""

import pytest
import torch
from mixtures import MIXTURES

from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.loading import apply_masks, load_model, load_state_into
from sparse_ft.models.mixtures import kept_experts, refitted, without_experts
from sparse_ft.models.names import parameter_masks, prunable_names, router_block, slots
from sparse_ft.pruning import MaskGenerator, PruningSettings
from sparse_ft.pruning.coverage import coverage_report


@pytest.fixture(scope="module", params=MIXTURES)
def layouts(request, tiny_model, tmp_path_factory):
    """The checkpoint that lists experts one by one, and transformers' own with all in one tensor."""
    listed, fused = tiny_model(request.param), tmp_path_factory.mktemp("fused")
    load_model(listed, "float32", "cpu").save_pretrained(fused, save_original_format=False)
    return Checkpoint(listed), Checkpoint(fused)


def test_either_layout_holds_the_same_tensors(layouts):
    listed, fused = layouts
    assert not fused.is_stored(next(name for name in listed.prunable if ".experts.0." in name))
    assert listed.prunable == fused.prunable
    for name in listed.prunable:
        assert torch.equal(listed.tensor(name), fused.tensor(name)), name
    fused.check()


@pytest.mark.parametrize(
    "how",
    [{}, {"scope": "global"}, {"scope": "row"}, {"method": "structured"}, {"method": "random"}],
    ids=lambda how: "-".join(how.values()) or "layer",
)
def test_masks_of_either_layout_are_the_same(layouts, tmp_path, how):
    made = [
        MaskGenerator(checkpoint.folder, PruningSettings(**how)).generate(tmp_path / name, figures="none")[0]
        for checkpoint, name in zip(layouts, "ab", strict=True)
    ]
    assert made[0].checksum == made[1].checksum


def test_every_linear_map_is_prunable_and_no_router(layouts):
    checkpoint, model = layouts[0], load_model(layouts[0].folder, "float32", "cpu")
    row = architecture_of(checkpoint.config)
    routers = (row.experts.router, *row.experts.weighers)
    maps = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(row.blocks) and parameter.ndim > 1 and not any(f".{word}." in name for word in routers)
    }
    assert {slot.parameter for slot in slots(checkpoint.config, checkpoint.prunable).values()} == maps
    left = coverage_report(checkpoint)["tensors_left"]
    assert set(left) <= {"embedding", "output head", "norm", "bias", "router"}
    blocks = [
        number for number in range(checkpoint.config["num_hidden_layers"]) if row.mixes(checkpoint.config, number)
    ]
    assert {router_block(checkpoint.config, name) for name in left["router"]["names"]} - {None} == set(blocks)


def test_a_model_in_memory_gets_back_all_that_it_had_with_what_corrects_its_router(tiny_model):
    checkpoint = Checkpoint(tiny_model("tiny-glm4_moe"))
    model = load_model(checkpoint.folder, "float32", "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("e_score_correction_bias" in name for name in before)
    for tensor in model.state_dict().values():
        tensor.add_(1)
    load_state_into(model, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def random_masks(checkpoint):
    generator = torch.Generator().manual_seed(0)
    shapes = checkpoint.prunable_shapes()
    return MaskSet.from_bool({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def test_masks_of_experts_in_one_tensor_fit_experts_one_by_one(layouts):
    """As versions before made them of such a checkpoint."""
    checkpoint, masks = layouts[1], random_masks(layouts[1])
    fused = MaskSet.from_bool(parameter_masks(checkpoint.config, masks), {"method": "unstructured"})
    assert set(fused) != set(masks)
    fitted = refitted(checkpoint.config, fused, checkpoint.prunable_shapes())
    assert fitted.checksum == masks.checksum and fitted.metadata == fused.metadata
    models = [load_model(checkpoint.folder, "float32", "cpu") for _ in range(2)]
    for model, given in zip(models, (fused, masks), strict=True):
        apply_masks(model, given)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_masks_lose_the_experts_that_are_gone(layouts):
    checkpoint, masks = layouts[0], random_masks(layouts[0])
    bits = {name: masks.bits[name] * (".experts.1." not in name) for name in masks}
    part = MaskSet(bits, masks.shapes)
    kept = kept_experts(checkpoint.config, part)
    assert kept and all(experts[:2] == [0, 2] for experts in kept.values())
    left = without_experts(checkpoint.config, part)
    for name in masks:
        if ".experts.2." in name:
            assert torch.equal(left[name.replace(".experts.2.", ".experts.1.")], masks[name])
        elif ".experts." not in name:
            assert torch.equal(left[name], masks[name])
    assert len(masks) - len(left) == sum(".experts.1." in name for name in masks)
    assert refitted(checkpoint.config, part, left.shapes).checksum == left.checksum


def test_masks_of_another_model_stay_what_they_are(tiny_model):
    llama, mixtral = Checkpoint(tiny_model("tiny-llama")), Checkpoint(tiny_model("tiny-mixtral"))
    masks = random_masks(llama)
    assert refitted(mixtral.config, masks, mixtral.prunable_shapes()) is masks


def test_a_mixture_of_another_layout_of_blocks_is_refused(tiny_model):
    checkpoint = Checkpoint(tiny_model("tiny-qwen2_moe"))
    with pytest.raises(UserError, match=r"lacks .* model\.layers\.0\.mlp\.gate_proj\.weight"):
        prunable_names(checkpoint.config | {"mlp_only_layers": [0]}, checkpoint.names)
