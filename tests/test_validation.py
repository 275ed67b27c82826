"""A checkpoint against its masks: every kind of damage is seen, counted by an independent count, and named."""

import json
import shutil

import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.models.names import parameter_masks, slots
from sparse_ft.models.tiny import make_tiny
from sparse_ft.validation import validate_checkpoint

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny("tiny-llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def masks(base):
    generator = torch.Generator().manual_seed(5)
    shapes = Checkpoint(base).prunable_shapes()
    kept = {name: torch.rand(shape, generator=generator) >= 0.6 for name, shape in shapes.items()}
    return MaskSet.from_bool(kept, {"method": "unstructured", "scope": "layer"})


def edited(base, masks, target, change=lambda name, tensor: None):
    """A pruned copy of ``base`` with ``change`` made to the pruned tensors in place."""

    def prune(name, tensor):
        tensor = tensor * masks[name] if name in masks else tensor.clone()
        change(name, tensor)
        return tensor

    return copy_checkpoint(Checkpoint(base), target, prune)


def test_a_pruned_checkpoint_passes_with_the_sparsity_of_its_masks(base, masks, tmp_path):
    result = validate_checkpoint(edited(base, masks, tmp_path / "pruned"), masks, base=base)
    assert result.ok and result.violations == 0 and result.problems == []
    pruned = sum(int((~masks[name]).sum()) for name in masks)
    assert result.sparsity == pruned / masks.n_weights == masks.sparsity
    assert [layer.name for layer in result.per_layer] == list(masks)
    json.dumps(result.to_dict(), allow_nan=False)


def test_an_unpruned_checkpoint_violates_every_masked_weight(base, masks):
    result = validate_checkpoint(base, masks)
    tensors = {name: Checkpoint(base).tensor(name) for name in masks}
    expected = {name: int((tensors[name][~masks[name]] != 0).sum()) for name in masks}
    assert not result.ok
    assert {layer.name: layer.violations for layer in result.per_layer} == expected
    largest = {name: float(tensors[name][~masks[name]].abs().max()) for name in masks}
    assert {layer.name: layer.max_violation for layer in result.per_layer} == largest
    assert result.violations == sum(expected.values())


def test_one_nonzero_weight_is_found_with_its_place_and_value(base, masks, tmp_path):
    row, column = (~masks[NAME]).nonzero()[-1].tolist()

    def touch(name, tensor):
        if name == NAME:
            tensor[row, column] = -0.25

    result = validate_checkpoint(edited(base, masks, tmp_path / "touched", touch), masks)
    assert (result.ok, result.violations) == (False, 1)
    (layer,) = [layer for layer in result.per_layer if layer.violations]
    assert (layer.name, layer.max_violation) == (NAME, 0.25)
    assert layer.examples == [{"index": [row, column], "value": -0.25}]
    assert result.sparsity == (masks.n_pruned - 1) / masks.n_weights
    assert any(NAME in line and "1 of" in line for line in result.lines())


def test_the_tolerance_is_inclusive_and_zero_by_default(base, masks, tmp_path):
    row, column = (~masks[NAME]).nonzero()[0].tolist()

    def touch(name, tensor):
        if name == NAME:
            tensor[row, column] = 2.0**-10

    folder = edited(base, masks, tmp_path / "small", touch)
    assert validate_checkpoint(folder, masks).violations == 1
    assert validate_checkpoint(folder, masks, tolerance=2.0**-10).violations == 0
    assert validate_checkpoint(folder, masks, tolerance=2.0**-11).violations == 1
    with pytest.raises(UserError, match="tolerance"):
        validate_checkpoint(folder, masks, tolerance=-1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tolerance", [0.0, 1e30])
def test_nan_and_infinity_are_violations_at_any_tolerance(base, masks, tmp_path, value, tolerance):
    row, column = (~masks[NAME]).nonzero()[0].tolist()

    def touch(name, tensor):
        if name == NAME:
            tensor[row, column] = value

    result = validate_checkpoint(edited(base, masks, tmp_path / "nan", touch), masks, tolerance)
    assert result.violations == 1
    assert [layer.max_violation for layer in result.per_layer if layer.violations] == [None]
    assert any("not finite" in problem for problem in result.problems)
    json.dumps(result.to_dict(), allow_nan=False)


def test_minus_zero_is_zero(base, masks, tmp_path):
    def negate(name, tensor):
        if name in masks:
            tensor[~masks[name]] = -0.0

    assert validate_checkpoint(edited(base, masks, tmp_path / "minus", negate), masks).ok


def test_a_nan_in_a_kept_weight_or_a_norm_is_a_problem_but_no_violation(base, masks, tmp_path):
    def spoil(name, tensor):
        if name == "model.norm.weight":
            tensor[0] = float("nan")
        if name == NAME:
            tensor[tuple(masks[NAME].nonzero()[0])] = float("inf")

    result = validate_checkpoint(edited(base, masks, tmp_path / "spoilt", spoil), masks)
    assert not result.ok and result.violations == 0
    assert sum("not finite" in problem for problem in result.problems) == 2


def test_tensors_that_were_not_to_be_trained_are_compared_with_the_base(base, masks, tmp_path):
    def train(name, tensor):
        if name.endswith("q_proj.weight"):
            tensor[masks[name]] += 0.5
        if name == "model.layers.0.input_layernorm.weight":
            tensor[3] += 0.5

    folder = edited(base, masks, tmp_path / "trained", train)
    assert validate_checkpoint(folder, masks).ok  # nothing to compare with
    result = validate_checkpoint(folder, masks, base=base)
    assert result.violations == 0 and len(result.problems) == 1 and "input_layernorm" in result.problems[0]
    result = validate_checkpoint(folder, masks, base=base, target_modules=("v_proj",))
    assert sum("q_proj" in problem for problem in result.problems) == 2


def test_a_merged_checkpoint_of_lower_precision_equals_its_rounded_base(base, masks, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edited(base, masks, tmp_path / "low")
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert validate_checkpoint(folder, masks, base=base).ok


def test_embeddings_that_are_no_longer_tied_are_a_problem(base, masks, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edited(base, masks, tmp_path / "untied")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head.clone()}, folder / "model.safetensors", {"format": "pt"})
    assert validate_checkpoint(folder, masks, base=base).ok  # stored twice, but equal
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    assert any("ties" in problem for problem in validate_checkpoint(folder, masks).problems)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "tie_word_embeddings": False})
    assert any("ties" in problem for problem in validate_checkpoint(folder, masks, base=base).problems)


def test_a_sparsity_other_than_the_one_asked_for_is_a_problem(base, masks, tmp_path):
    folder = edited(base, masks, tmp_path / "pruned")
    wrong = MaskSet(masks.packed, masks.shapes, {**masks.metadata, "sparsity": 0.5})
    assert any("asked" in problem for problem in validate_checkpoint(folder, wrong).problems)
    lie = MaskSet(masks.packed, masks.shapes, {**masks.metadata, "achieved": 0.5})
    assert any("reach" in problem for problem in validate_checkpoint(folder, lie).problems)
    exact = {"sparsity": masks.sparsity, "achieved": masks.sparsity}
    assert validate_checkpoint(folder, MaskSet(masks.packed, masks.shapes, {**masks.metadata, **exact})).ok


def test_masks_of_another_model_and_missing_folders_are_refused(base, masks, tmp_path):
    other = make_tiny("tiny-mistral", tmp_path / "mistral")
    with pytest.raises(UserError, match="do not fit"):
        validate_checkpoint(other, masks)
    fewer = MaskSet.from_bool({name: masks[name] for name in masks if name != NAME})
    with pytest.raises(UserError, match="down_proj"):
        validate_checkpoint(base, fewer)
    with pytest.raises(UserError, match="no such folder"):
        validate_checkpoint(tmp_path / "absent", masks)
    shutil.rmtree(other)


def test_masks_of_fused_experts_fit_a_checkpoint_that_names_each_expert(tmp_path):
    folder = make_tiny("tiny-mixtral", tmp_path / "mixtral")
    checkpoint = Checkpoint(folder)
    generator = torch.Generator().manual_seed(6)
    single = {n: torch.rand(s, generator=generator) >= 0.5 for n, s in checkpoint.prunable_shapes().items()}
    fused = MaskSet.from_bool(parameter_masks(checkpoint.config, single))
    assert set(fused) != set(single)
    pruned = edited(folder, single, tmp_path / "pruned")
    result = validate_checkpoint(pruned, fused, base=folder)
    assert result.ok and len(result.per_layer) == len(single)
    name = next(name for name in single if ".w3." in name)
    place = tuple((~single[name]).nonzero()[0])

    def touch(other, tensor):
        if other == name:
            tensor[place] = 1.0

    result = validate_checkpoint(edited(folder, single, tmp_path / "touched", touch), fused)
    assert [layer.name for layer in result.per_layer if layer.violations] == [name]
    assert slots(checkpoint.config, [name])[name].parameter in fused


def test_blocks_of_rows_see_what_the_whole_tensor_shows(base, masks, tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_ft.validation._BLOCK", 700)
    expected = {n: int((Checkpoint(base).tensor(n)[~masks[n]] != 0).sum()) for n in masks}
    result = validate_checkpoint(base, masks)
    assert {layer.name: layer.violations for layer in result.per_layer} == expected
    zeros = {layer.name: layer.zeros for layer in result.per_layer}
    assert zeros == {n: int((Checkpoint(base).tensor(n) == 0).sum()) for n in masks}
    for layer in result.per_layer:
        for example in layer.examples:
            assert Checkpoint(base).tensor(layer.name)[tuple(example["index"])].item() == example["value"]
