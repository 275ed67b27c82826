import json
import sys

import h5py
import numpy as np
import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.models.cerebras.mdl import MdlFile, write_mdl


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(13, 7, generator=generator),
        "b.weight": torch.randn(5, 4, 6, generator=generator).bfloat16(),
        "c": torch.randn(9, generator=generator).half(),
        "a.weight_mask": torch.rand(13, 7, generator=generator) > 0.5,
        "n": torch.arange(4),
        "s": torch.tensor(2.5),
    }


def written(path):
    with write_mdl(path) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)
        writer.link("d.weight", "a.weight")
    return MdlFile(path)


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    file = written(tmp_path / "x.mdl")
    for name, tensor in tensors().items():
        found = file.read(name)
        assert found.dtype == tensor.dtype == file.entries[name].dtype
        assert found.shape == tensor.shape == file.entries[name].shape
        assert torch.equal(found, tensor)
    assert torch.equal(file.read("d.weight"), tensors()["a.weight"])
    assert torch.equal(file.read("b.weight", (slice(None), 2, slice(None))), tensors()["b.weight"][:, 2])


def test_bfloat16_is_int16_with_an_attribute(tmp_path):
    written(tmp_path / "x.mdl")
    with h5py.File(tmp_path / "x.mdl") as file:
        assert file["model.b.weight"].dtype == np.int16
        assert list(file["model.b.weight"].attrs["dtypes"]) == ["torch.bfloat16"]
        assert file["model.a.weight"]._filters.keys() == {"32004"}  # LZ4


def test_a_half_written_file_is_refused_and_none_appears(tmp_path):
    with pytest.raises(RuntimeError), write_mdl(tmp_path / "x.mdl") as writer:
        writer.write("a", torch.zeros(2))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "x.mdl")
    with h5py.File(tmp_path / "x.mdl", "a") as file:
        del file.attrs["__SUCCESS__"]
    with pytest.raises(UserError, match="not written to its end"):
        MdlFile(tmp_path / "x.mdl")


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        MdlFile(tmp_path / "no.mdl")
    (tmp_path / "text.mdl").write_text("no HDF5")
    with pytest.raises(UserError, match="no HDF5 file"):
        MdlFile(tmp_path / "text.mdl")
    with h5py.File(tmp_path / "old.mdl", "w") as file:
        file.attrs["__version__"] = 0.4
    with pytest.raises(UserError, match="format version"):
        MdlFile(tmp_path / "old.mdl")


def test_a_name_twice_or_a_foreign_dtype_is_refused(tmp_path):
    with write_mdl(tmp_path / "x.mdl") as writer:
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError):
            writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError):
            writer.write("z", torch.zeros(2, dtype=torch.complex64))


def test_the_tree_lists_the_names_in_the_order_of_writing(tmp_path):
    written(tmp_path / "x.mdl")
    with h5py.File(tmp_path / "x.mdl") as file:
        plain, tree = json.loads(file.attrs["__spec__"])
    assert list(plain["model"]) == [*tensors(), "d.weight"]
    assert json.loads(tree)[1]["children_spec"][0]["context"] == json.dumps([*tensors(), "d.weight"])


def test_without_h5py_it_says_what_to_install(tmp_path, monkeypatch):
    written(tmp_path / "x.mdl")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as where it is not installed
    for use in (lambda: MdlFile(tmp_path / "x.mdl"), lambda: write_mdl(tmp_path / "y.mdl").__enter__()):
        with pytest.raises(UserError, match=r"pip install 'sparse_ft\[cerebras\]'$"):
            use()
