import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_ft.errors import UserError
from sparse_ft.masks.files import MaskFileWriter, load_masks, save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.settings.commands import FORMATS


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(1)
    tensors = {f"model.layers.{i}.weight": torch.rand(7, 21, generator=generator) > 0.5 for i in range(4)}
    tensors["model.layers.0.experts"] = torch.rand(2, 4, 10, generator=generator) > 0.3
    return MaskSet.from_bool(tensors, {"method": "unstructured", "sparsity": 0.5, "calibration": None})


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_back_the_same_identity(masks, kind, tmp_path):
    path = save_masks(masks, tmp_path / f"masks.{kind}")
    loaded = load_masks(path)
    assert loaded.checksum == masks.checksum
    assert loaded.metadata == masks.metadata
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert list(tmp_path.iterdir()) == [path]


def test_the_bits_on_disk_are_an_ordinary_safetensors_file(masks, tmp_path):
    stored = load_file(save_masks(masks, tmp_path / "masks.safetensors"))
    name = "model.layers.2.weight"
    expected = np.packbits(masks[name].numpy(), axis=-1, bitorder="little")
    assert stored[name].dtype == torch.uint8
    assert np.array_equal(stored[name].numpy(), expected)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_a_clear_error(masks, kind, part, tmp_path):
    path = save_masks(masks, tmp_path / f"masks.{kind}")
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(UserError, match=r"masks\."):
        load_masks(path)


def test_an_edited_bit_is_noticed(masks, tmp_path):
    path = save_masks(masks, tmp_path / "masks.safetensors")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"changed after it was written|damaged"):
        load_masks(path)


def test_foreign_files_are_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    np.savez(tmp_path / "foreign.npz", w=np.zeros(2))
    torch.save({"w": torch.zeros(2)}, tmp_path / "foreign.pt")
    (tmp_path / "text.npz").write_text("hello")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError):
            load_masks(path)


class _Boom:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"sparse_ft_masks": "{}", "bits": _Boom()}, "evil.pt")
    with pytest.raises(UserError):
        load_masks("evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_missing_files_and_unknown_suffixes_say_what_to_do(masks, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_masks(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"\.npz"):
        save_masks(masks, tmp_path / "masks.bin")


def test_another_format_version_is_refused(masks, tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_ft.masks.files.FORMAT_VERSION", 2)
    path = save_masks(masks, tmp_path / "masks.safetensors")
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 2"):
        load_masks(path)


def test_the_writer_takes_tensors_in_any_order_from_several_threads(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    writer = MaskFileWriter(path, masks.shapes)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: writer.write(name, masks.packed[name].numpy()), reversed(list(masks))))
    assert not path.exists()  # it appears when it is whole
    assert writer.close(masks.metadata) == masks.checksum
    assert load_masks(path).checksum == masks.checksum


def test_an_incomplete_or_aborted_file_never_appears(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    writer = MaskFileWriter(path, masks.shapes)
    with pytest.raises(ValueError, match="not written"):
        writer.close({})
    writer = MaskFileWriter(path, masks.shapes)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_metadata_beyond_their_room_are_refused(masks, tmp_path):
    writer = MaskFileWriter(tmp_path / "masks.safetensors", masks.shapes)
    for name in masks:
        writer.write(name, masks.packed[name].numpy())
    with pytest.raises(ValueError, match="metadata"):
        writer.close({"long": "x" * 100_000})


def test_a_killed_write_leaves_the_old_file(masks, tmp_path):
    path = save_masks(masks, tmp_path / "masks.safetensors")
    program = f"""
        import os, signal, torch
        from sparse_ft.masks.files import MaskFileWriter
        writer = MaskFileWriter({str(path)!r}, {{"a": (64, 64), "b": (64, 64)}})
        writer.write("a", torch.zeros(64, 8, dtype=torch.uint8).numpy())
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert load_masks(path).checksum == masks.checksum


def test_rows_written_piece_by_piece_are_the_same_file(masks, tmp_path):
    writer = MaskFileWriter(tmp_path / "pieces.safetensors", masks.shapes)
    for name in masks:  # tensors interleaved, rows in order
        writer.append(name, masks.packed[name].numpy().reshape(-1, masks.packed[name].shape[-1])[:3])
    with pytest.raises(ValueError, match="written twice"):
        writer.write("model.layers.0.weight", masks.packed["model.layers.0.weight"].numpy())
    for name in masks:
        writer.append(name, masks.packed[name].numpy().reshape(-1, masks.packed[name].shape[-1])[3:])
    with pytest.raises(ValueError, match="more rows"):
        writer.append("model.layers.0.weight", np.zeros((1, 3), np.uint8))
    assert writer.close(masks.metadata) == masks.checksum
    save_masks(masks, tmp_path / "whole.safetensors")
    assert (tmp_path / "pieces.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
