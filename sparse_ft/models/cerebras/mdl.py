"""Cerebras checkpoints (``.mdl``): HDF5 files of cerebras.pytorch 2.x, read and written tensor by tensor.

The layout, as cerebras.pytorch 2.10 writes it (format version 0.5): one dataset per tensor, named by its path in
the saved dictionary joined by dots (``model.`` + the module's name), LZ4-compressed; bfloat16 is stored as int16
and told apart by the attribute ``dtypes``. The file's attributes hold the tree of the dictionary (``__spec__``)
and one JSON entry a leaf; tied tensors are stored once and linked. ``__SUCCESS__`` is written last.

cerebras.pytorch's own `save` loses edits made in place on tensors that `load` had only promised to read; reading
and writing the datasets themselves has no such trap, and memory for one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_path
from sparse_ft.memory import trim_heap

if TYPE_CHECKING:
    import h5py

__all__ = ["MdlEntry", "MdlFile", "MdlWriter", "hdf5", "write_mdl"]

_FORMAT = 0.5
_PROGRAM = "2.10.0"
_TRIMMED = 1 << 20  # bytes; smaller tensors are not worth the call
# torch dtype -> (how it is stored, the Cerebras runtime's number of the type)
_STORED = {
    torch.float32: (np.dtype(np.float32), 11),
    torch.bfloat16: (np.dtype(np.int16), 15),
    torch.float16: (np.dtype(np.float16), 10),
    torch.bool: (np.dtype(np.bool_), 1),
    torch.int64: (np.dtype(np.int64), 5),
}
_DTYPES = {str(dtype): dtype for dtype in (*_STORED, torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8)}


@dataclass(frozen=True)
class MdlEntry:
    """One tensor: the dataset that holds it, its shape and its dtype."""

    dataset: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class MdlFile:
    """The tensors under ``model`` of a checkpoint, by the module's names; nothing is read on opening but the tree.

    Raises:
        UserError: no such file, no HDF5, half-written, or of another format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries: dict[str, MdlEntry] = {}
        with self._open() as file:
            if float(file.attrs.get("__version__", 0)) != _FORMAT:
                raise UserError(
                    f"{path} is no checkpoint of cerebras.pytorch 2.x (format version {file.attrs.get('__version__')},"
                    f" read is {_FORMAT}). Convert it with `cszoo checkpoint convert`."
                )
            if not bool(file.attrs.get("__SUCCESS__", False)):
                raise UserError(f"{path} was not written to its end. Take an older checkpoint, or save it again.")
            for attribute in file.attrs:
                if attribute.startswith("model.") and attribute.endswith(".__metadata__"):
                    name = attribute.removeprefix("model.").removesuffix(".__metadata__")
                    self.entries[name] = _entry(file, "model." + name, self.path)

    def read(self, name: str, index: Any = ()) -> torch.Tensor:
        """The tensor, or the part ``tensor[index]`` of it (slices and integers), in memory of its own."""
        entry = self.entries[name]
        with self._open() as file:
            tensor = torch.from_numpy(np.array(file[entry.dataset][index], order="C"))
        return tensor.view(torch.bfloat16) if entry.dtype is torch.bfloat16 else tensor

    def metadata(self) -> list[dict[str, Any]]:
        """What ModelZoo noted about the run that saved the file (``__metadata__``); empty where it noted nothing."""
        with self._open() as file:
            leaves = [key for key in file.attrs if key.startswith("__metadata__.")]
            return [json.loads(file.attrs[key]) for key in leaves]

    @contextmanager
    def _open(self) -> Iterator[h5py.File]:
        h5py = hdf5()
        if not self.path.is_file():
            raise UserError(f"Checkpoint {self.path} does not exist.")
        try:
            file = h5py.File(self.path, "r", locking="best-effort")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read, it is truncated or no HDF5 file: {error}") from None
        with file:
            yield file


class MdlWriter:
    """Writes a checkpoint tensor by tensor; `write_mdl` makes one."""

    def __init__(self, file: h5py.File):
        self._file = file
        self._names: list[str] = []
        file.attrs["__version__"] = _FORMAT
        file.attrs["__cstorch_version__"] = _PROGRAM

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor under ``model``, by the module's name.

        Raises:
            ValueError: a name that is there already, or a dtype the format has no number for.
        """
        if name in self._names or tensor.dtype not in _STORED:
            raise ValueError(f"{name} ({tensor.dtype}) cannot be written")
        stored, number = _STORED[tensor.dtype]
        tensor = tensor.detach().contiguous().cpu()
        array = tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
        compression = _lz4() if tensor.dim() else {}
        dataset = self._file.create_dataset("model." + name, data=array.astype(stored, copy=False), **compression)
        about = {
            "__TORCH__": True,
            "shapes": [list(tensor.shape)],
            "dtypes": [str(tensor.dtype)],
            "rtfx_dtypes": [number],
            "__TYPE__": "TorchTensorSerializer",
            "__NUMPY__": True,
            "compressed": False,
        }
        dataset.attrs.update(about)
        self._note(name, about)
        if tensor.nbytes >= _TRIMMED:  # HDF5's notes on this tensor lie between its copies, which are free now
            trim_heap()

    def link(self, name: str, target: str) -> None:
        """Adds ``name`` as another name of the tensor ``target`` (tied weights)."""
        about = {"key": "model." + target, "__LINKED__": True, "__TYPE__": "LinkedObject", "__NONE__": True}
        self._note(name, about)

    def finish(self) -> None:
        """Writes the tree, and that the file is whole."""
        leaves = [{"type": None, "context": None, "children_spec": []} for _ in self._names]
        inner = {"type": "builtins.dict", "context": json.dumps(self._names), "children_spec": leaves}
        tree = {"type": "builtins.dict", "context": '["model"]', "children_spec": [inner]}
        plain = {"model": dict.fromkeys(self._names, "*")}
        self._file.attrs["__spec__"] = json.dumps([plain, json.dumps([1, tree])], indent=4)
        self._file.attrs["__SUCCESS__"] = True

    def _note(self, name: str, about: dict[str, Any]) -> None:
        key = "model." + name
        leaf = {"type": None, "context": None, "children_spec": []}
        tree = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]}
        entry = {
            "__spec__": [{key: "*"}, json.dumps([1, tree])],
            "__objects__": [key],
            f"{key}.__metadata__": about,
        }
        self._file.attrs[f"{key}.__metadata__"] = json.dumps(entry, indent=4)
        self._names.append(name)


@contextmanager
def write_mdl(path: str | Path) -> Iterator[MdlWriter]:
    """Yields a writer; the file appears under its name when the block ends well."""
    h5py = hdf5()
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        writer = MdlWriter(file)
        yield writer
        writer.finish()


def _entry(file: h5py.File, key: str, path: Path) -> MdlEntry:
    about = json.loads(file.attrs[f"{key}.__metadata__"])[f"{key}.__metadata__"]
    if about.get("__LINKED__"):
        return _entry(file, about["key"], path)
    if not about.get("__NUMPY__") or key not in file or about["dtypes"][0] not in _DTYPES:
        raise UserError(f"{path}: {key} is stored as {about.get('__TYPE__')}, which is read by cerebras.pytorch only.")
    return MdlEntry(key, tuple(file[key].shape), _DTYPES[about["dtypes"][0]])


def hdf5() -> ModuleType:
    """The module h5py, with LZ4 registered.

    Raises:
        UserError: it is not installed.
    """
    try:
        import h5py
        import hdf5plugin  # noqa: F401  registers LZ4
    except ImportError as error:
        raise UserError(f"Files of a Cerebras are HDF5: {error}. pip install 'sparse_ft[cerebras]'") from None
    return h5py


def _lz4() -> dict[str, Any]:
    import hdf5plugin

    return dict(hdf5plugin.LZ4())
