"""Loading, masking, restoring and saving, on the tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import (
    apply_masks,
    load_model,
    load_state_into,
    load_tokenizer,
    prunable_shapes,
    resolve_dtype,
    save_model,
)
from sparse_ft.models.tiny import make_tiny

KINDS = ("tiny-llama", "tiny-mistral", "tiny-mixtral")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_tiny(kind, root / kind) for kind in KINDS}


def random_masks(folder: Path, seed: int = 0) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = Checkpoint(folder).prunable_shapes()
    return MaskSet.from_bool({name: torch.rand(shape, generator=generator) > 0.6 for name, shape in shapes.items()})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def ids(folder: Path) -> torch.Tensor:
    return load_tokenizer(folder)("Question: is water wet?\nAnswer: yes", return_tensors="pt").input_ids


# -- names of devices and dtypes


def test_dtype_names():
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="int8"):
        resolve_dtype("int8", "cpu")


# -- loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_computes_what_transformers_computes(kind: str, dtype: torch.dtype, folders):
    model = load_model(folders[kind], dtype, "cpu")
    assert not model.training and model.dtype == dtype and model.config._attn_implementation == "sdpa"
    other = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=dtype).eval()
    tokens = ids(folders[kind])
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_made_up(folders, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["tiny-llama"], broken)
    tensors = weights(broken)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(broken, "float32", "cpu")


def test_an_unmerged_adapter_model_is_refused(folders, tmp_path: Path):
    adapted = get_peft_model(load_model(folders["tiny-llama"], "float32", "cpu"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge"):
        save_model(adapted.base_model.model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # ... and what other tools write of it is refused when it is read
    named = {name.removeprefix("base_model.model."): value for name, value in adapted.state_dict().items()}
    shutil.copytree(folders["tiny-llama"], tmp_path / "theirs")
    contiguous = {name: value.clone() for name, value in named.items() if name != "lm_head.weight"}
    save_file(contiguous, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="adapter"):
        load_model(tmp_path / "theirs", "float32", "cpu")


@pytest.mark.parametrize("problem", ["absent", "truncated", "no config"])
def test_unreadable_checkpoints_are_one_line(problem: str, folders, tmp_path: Path):
    folder = tmp_path / "m"
    if problem != "absent":
        shutil.copytree(folders["tiny-llama"], folder)
    if problem == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
    if problem == "no config":
        (folder / "config.json").unlink()
    with pytest.raises(UserError, match=str(folder)):
        load_model(folder, "float32", "cpu")


def test_tokenizer_without_pad_token_pads_with_its_end(folders, tmp_path: Path):
    shutil.copytree(folders["tiny-llama"], tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.pad_token == "</s>"
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


# -- saving


@pytest.mark.parametrize("kind", KINDS)
def test_saving_gives_back_the_same_checkpoint(kind: str, folders, tmp_path: Path):
    target = save_model(load_model(folders[kind], "float32", "cpu"), load_tokenizer(folders[kind]), tmp_path / "again")
    before, after = weights(folders[kind]), weights(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (target / "tokenizer.json").read_bytes() == (folders[kind] / "tokenizer.json").read_bytes()
    assert Checkpoint(target).config == Checkpoint(folders[kind]).config
    modes = {path.stat().st_mode for path in target.iterdir()}
    assert len(modes) == 1  # who may read the config may read the weights


@pytest.mark.parametrize("kind", KINDS)
def test_saving_in_shards_gives_back_the_same_weights(kind: str, folders, tmp_path: Path):
    target = save_model(load_model(folders[kind], "float32", "cpu"), None, tmp_path / "shards", "20KB")
    assert len(list(target.glob("*.safetensors"))) > 4
    before, after = Checkpoint(folders[kind]), Checkpoint(target)
    assert after.names == before.names
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


def test_tied_embeddings_stay_tied_and_are_stored_once(folders, tmp_path: Path):
    model = load_model(folders["tiny-llama"], "float32", "cpu")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] += 1
    target = save_model(model, None, tmp_path / "m")
    assert "lm_head.weight" not in weights(target)
    again = load_model(target, "float32", "cpu")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_zeros_and_low_precision_survive_saving(folders, tmp_path: Path):
    model = load_model(folders["tiny-mixtral"], torch.bfloat16, "cpu")
    masks = random_masks(folders["tiny-mixtral"])
    apply_masks(model, masks)
    stored = weights(save_model(model, None, tmp_path / "m"))
    for name, mask in masks.items():
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name] != 0, mask)


def test_save_replaces_a_checkpoint_and_nothing_else(folders, tmp_path: Path):
    model = load_model(folders["tiny-llama"], "float32", "cpu")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis"):
        save_model(model, None, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    save_model(model, None, tmp_path / "m")
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    save_model(model, None, tmp_path / "m")
    assert (weights(tmp_path / "m")["model.norm.weight"] == 7).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "thesis"]


def test_failed_save_leaves_the_old_checkpoint(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(folders["tiny-llama"], "float32", "cpu")
    target = save_model(model, None, tmp_path / "m")
    before = weights(target)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_model(model, None, target)
    assert weights(target).keys() == before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_generation_config_that_breaks_its_own_rules_can_be_saved(folders, tmp_path: Path):
    """LLaMA-2 was published with a temperature but without sampling; transformers refuses to save that."""
    shutil.copytree(folders["tiny-llama"], tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": false}')
    target = save_model(load_model(tmp_path / "m", "float32", "cpu"), None, tmp_path / "out")
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.6


# -- masks and restoring


@pytest.mark.parametrize("kind", KINDS)
def test_masks_zero_exactly_their_weights(kind: str, folders, tmp_path: Path):
    model, masks = load_model(folders[kind], "float32", "cpu"), random_masks(folders[kind])
    apply_masks(model, masks)
    before, after = weights(folders[kind]), weights(save_model(model, None, tmp_path / "m"))
    for name in before:
        expected = before[name] * masks[name] if name in masks.shapes else before[name]
        assert torch.equal(after[name], expected), name
        assert not torch.signbit(after[name][after[name] == 0]).any() or name not in masks.shapes


@pytest.mark.parametrize("kind", KINDS)
def test_prunable_shapes_of_the_model_are_those_of_its_checkpoint(kind: str, folders):
    model = load_model(folders[kind], "float32", "cpu")
    assert prunable_shapes(model) == Checkpoint(folders[kind]).prunable_shapes()
    fused = prunable_shapes(model, fused=True)
    sizes = [sum(torch.Size(shape).numel() for shape in shapes.values()) for shapes in (fused, prunable_shapes(model))]
    assert sizes[0] == sizes[1] and (len(fused) < len(prunable_shapes(model))) == (kind == "tiny-mixtral")


def test_masks_by_fused_names_apply_too(folders):
    model = load_model(folders["tiny-mixtral"], "float32", "cpu")
    generator = torch.Generator().manual_seed(1)
    shapes = prunable_shapes(model, fused=True)
    masks = {name: torch.rand(shape, generator=generator) > 0.5 for name, shape in shapes.items()}
    before = {name: model.get_parameter(name).clone() for name in shapes}
    apply_masks(model, MaskSet.from_bool(masks))
    assert all(torch.equal(model.get_parameter(name), before[name] * masks[name]) for name in shapes)


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_masks_that_do_not_fit_change_nothing(change: str, folders):
    model = load_model(folders["tiny-llama"], "float32", "cpu")
    masks = dict(random_masks(folders["tiny-llama"]))
    name = "model.layers.0.mlp.down_proj.weight"
    if change == "missing":
        del masks[name]
    if change == "foreign":
        masks["model.layers.0.mlp.down_proj"] = masks[name]
    if change == "shape":
        masks[name] = masks[name][:, :-1].contiguous()
    with pytest.raises(UserError, match=r"down_proj"):
        apply_masks(model, MaskSet.from_bool(masks))
    stored = weights(folders["tiny-llama"])
    assert all(torch.equal(model.get_parameter(key), value) for key, value in stored.items())


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_undoes_any_change(kind: str, folders):
    folder = folders[kind]
    model, fresh = load_model(folder, torch.bfloat16), load_model(folder, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3).add_(1)
    load_state_into(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert torch.equal(model(ids(folder)).logits, fresh(ids(folder)).logits)


def test_restoring_only_some(folders):
    folder = folders["tiny-mixtral"]
    model, checkpoint = load_model(folder, "float32", "cpu"), Checkpoint(folder)
    apply_masks(model, random_masks(folder))
    with torch.no_grad():
        model.model.norm.weight.fill_(9)
    load_state_into(model, checkpoint, checkpoint.prunable)
    assert (model.model.norm.weight == 9).all()
    load_state_into(model, checkpoint, ["model.norm.weight"])
    fresh = load_model(folder, "float32", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_restoring_from_another_architecture_is_refused(folders):
    with pytest.raises(UserError, match="tiny-mistral"):
        load_state_into(load_model(folders["tiny-llama"], "float32", "cpu"), folders["tiny-mistral"])
    with pytest.raises(UserError, match="no tensor x"):
        load_state_into(load_model(folders["tiny-llama"], "float32", "cpu"), folders["tiny-llama"], ["x"])
