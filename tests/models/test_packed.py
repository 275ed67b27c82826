"""Packed checkpoints: the very bytes again, one identity however they lie, and refused where anything is not theirs."""

import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft import cli
from sparse_ft.errors import UserError
from sparse_ft.masks.files import save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import (
    apply_masks,
    from_packed,
    load_model,
    load_tokenizer,
    prunable_shapes,
    save_model,
    saved_tokenizer,
)
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.models.packed import PackedCheckpoint
from sparse_ft.models.packing import pack_checkpoint, packed_bytes, unpack_checkpoint
from sparse_ft.validation import validate_checkpoint

IDS = torch.arange(3, 19).view(2, 8)


def drawn(shapes, kept=0.3):
    generator = torch.Generator().manual_seed(0)
    return MaskSet.from_bool({name: torch.rand(shape, generator=generator) < kept for name, shape in shapes.items()})


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-mixtral", "tiny-qwen3_moe", "tiny-gemma3_text"])
def sparse(request, tmp_path_factory, tiny_model):
    """A sparse bfloat16 checkpoint in shards, with odd bits where they are kept; its masks."""
    home, base = tmp_path_factory.mktemp("sparse"), tiny_model(request.param)
    model = load_model(base, "bfloat16", "cpu")
    masks = drawn(prunable_shapes(model))
    apply_masks(model, masks)
    save_model(model, saved_tokenizer(base), home / "plain", max_shard_size="50KB")
    checkpoint = Checkpoint(home / "plain")
    name = next(name for name in checkpoint.prunable if checkpoint.is_stored(name) and "o_proj" in name)
    row, column = masks[name].nonzero()[0].tolist()
    file, stored = checkpoint.shard(name), checkpoint.stored_name(name)
    tensors = load_file(file)
    tensors[stored][row, column] = -0.0
    save_file(tensors | {"rotary.inv_freq": torch.ones(3)}, file, metadata={"format": "pt", "made": "by hand"})
    return home / "plain", masks


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


def test_the_very_files_come_back_and_the_model_without_them(sparse, tmp_path):
    plain, masks = sparse
    source = Checkpoint(plain)
    packed = pack_checkpoint(source, masks, tmp_path / "packed")
    assert len(packed.weights.files) == len(source.files) > 1
    assert packed.about["fingerprint"] == packed.fingerprint == source.fingerprint
    assert packed.masks.checksum == masks.checksum
    assert all((source.raw(name) == packed.raw(name)).all() for name in source.names)
    assert validate_checkpoint(tmp_path / "packed", masks).violations == 0
    before, after = packed_bytes(source, masks)
    held = {**{entry.name: entry for entry in packed._here.values()}}
    assert before == sum(entry.end for entry in packed.stored.values())
    assert after == sum(entry.end - entry.begin for entry in held.values()) < 0.9 * before

    model, expected = from_packed(tmp_path / "packed", "bfloat16", "cpu"), load_model(plain, "bfloat16", "cpu")
    assert torch.equal(model(IDS).logits, expected(IDS).logits) and type(model) is type(expected)
    assert model.generation_config == expected.generation_config and not model.training
    assert load_tokenizer(tmp_path / "packed")("hi") == load_tokenizer(plain)("hi")
    assert same_files(plain, unpack_checkpoint(packed, tmp_path / "again"))


@pytest.fixture
def llama(tiny_model, tmp_path):
    """A sparse float32 checkpoint in one file, its masks, and it packed."""
    model = load_model(tiny_model("tiny-llama"), "float32", "cpu")
    masks = drawn(prunable_shapes(model))
    apply_masks(model, masks)
    folder = save_model(model, saved_tokenizer(tiny_model("tiny-llama")), tmp_path / "plain")
    return folder, masks, pack_checkpoint(folder, masks, tmp_path / "packed")


def test_shards_and_one_file_are_one_identity(llama, tmp_path):
    plain, masks, packed = llama
    save_model(load_model(plain, "float32", "cpu"), None, tmp_path / "shards", max_shard_size="90KB")
    shards = pack_checkpoint(tmp_path / "shards", masks, tmp_path / "packed shards")
    assert len(shards.files) > 1 and shards.identity == packed.identity
    name = packed.prunable[0]
    other = Checkpoint(tmp_path / "shards")
    tensors = load_file(other.shard(name))
    tensors[name] *= 2
    save_file(tensors, other.shard(name))
    assert pack_checkpoint(other.folder, masks, tmp_path / "x").identity != packed.identity


@pytest.mark.parametrize("value", [-0.0, 1e-30, float("nan")])
def test_a_pruned_weight_that_is_not_zero_is_one_line_and_leaves_nothing(llama, tmp_path, value):
    plain, masks, _ = llama
    file, name = plain / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    row, column = (~masks[name]).nonzero()[5].tolist()
    tensors[name][row, column] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has 1 weights .* first at \[{row}, {column}\]"):
        pack_checkpoint(plain, masks, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))


def test_what_is_not_as_it_was_packed_is_refused(llama, tmp_path):
    _, _, packed = llama
    file = packed.folder / "packed.model.safetensors"
    whole = file.read_bytes()

    def write(content):
        """Another file in its place: threads of transformers may still have the one before mapped."""
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(file)

    def refused(said, act):
        with pytest.raises(UserError, match=said):
            act(tmp_path / "packed")
        write(whole)

    changed = bytearray(whole)
    begin = packed._here["model.layers.0.self_attn.q_proj.weight.kept"].begin
    changed[begin] ^= 1
    write(changed)
    refused("not what was packed", lambda folder: unpack_checkpoint(folder, tmp_path / "x"))
    write(changed)
    refused("not what was packed", from_packed)
    changed = bytearray(whole)
    changed[packed._here["model.layers.0.self_attn.q_proj.weight.bits"].begin] ^= 1
    write(changed)
    refused("not there as it was packed", PackedCheckpoint)
    write(whole[:-7])
    refused("truncated", PackedCheckpoint)
    write((tmp_path / "plain" / "model.safetensors").read_bytes())
    refused("no file of a packed checkpoint", PackedCheckpoint)
    file.unlink()
    refused("is missing", PackedCheckpoint)
    about = json.loads((packed.folder / "packed.json").read_text())
    for changes, said in (
        ({"version": 2}, "in version 2"),
        ({"files": ["../x"]}, "is damaged"),
        ({"mask_checksum": "0" * 64}, "was changed after"),
    ):
        (packed.folder / "packed.json").write_text(json.dumps(about | changes))
        refused(said, PackedCheckpoint)
    assert not (tmp_path / "x").exists()


def test_no_program_takes_a_packed_folder_for_a_plain_one(llama, tmp_path):
    plain, masks, packed = llama
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(packed.folder)
    with pytest.raises(UserError, match=r"is packed .* sparse-ft unpack"):
        Checkpoint(packed.folder)
    with pytest.raises(UserError, match=r"no packed.json"):
        from_packed(plain)
    assert isinstance(open_checkpoint(packed.folder), PackedCheckpoint)
    with pytest.raises(UserError, match="do not fit"):
        pack_checkpoint(plain, drawn({"x": (4, 4)}), tmp_path / "x")
    with pytest.raises(UserError, match="the checkpoint itself"):
        pack_checkpoint(plain, masks, plain)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="something else"):
        unpack_checkpoint(packed, tmp_path / "full")


def test_the_commands_say_the_bytes_of_the_files(llama, tmp_path, capsys):
    plain, masks, _ = llama
    file = save_masks(masks, tmp_path / "masks.safetensors")
    to = tmp_path / "by command"
    assert cli.run("pack", ["--checkpoint", str(plain), "--masks", str(file), "--output", str(to)], "x") == 0
    before, after = (plain / "model.safetensors").stat().st_size, (to / "packed.model.safetensors").stat().st_size
    assert f"{after:,} bytes, plain {before:,}: {before / after:.2f} times smaller" in capsys.readouterr().out
    assert cli.run("unpack", ["--checkpoint", str(to), "--output", str(tmp_path / "again")], "x") == 0
    assert same_files(plain, tmp_path / "again")
    assert cli.run("unpack", ["--checkpoint", str(plain), "--output", str(tmp_path / "y")], "x") == 2
    assert "no packed.json. Make one with sparse-ft pack.\n" in capsys.readouterr().err
