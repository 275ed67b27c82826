"""Reading mask files that anybody may have made: nothing is believed, and no array is larger than its file.

Every format carries one JSON header. It is parsed strictly and bounds everything that is read after it.
"""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sparse_ft.masks.mask_set import packed_shape
from sparse_ft.settings.rules import STEPS

__all__ = ["HEADER_KEY", "NotOursError", "parse_header", "read_npz", "read_pt", "read_safetensors"]

HEADER_KEY = "sparse_ft_masks"
_LARGEST_HEADER = 64 << 20  # bytes; that of an eight-expert model of 70 B weights has 1.5 MB
_NUMBERS = ("sparsity", "achieved")
_COUNTS = ("samples", "length")  # of the calibration text
_TUNING = ("epochs", "batch", "learning_rate")  # of block reconstruction
_TEXTS = ("method", "importance", *STEPS, "scope", "model", "fingerprint", "source_fingerprint", "pattern",
          "allocation")  # fmt: skip
# What the pickle of a mask file names. Anything else, harmless or not, is another file's.
_PICKLED = {"torch._utils _rebuild_tensor_v2", "torch ByteStorage", "collections OrderedDict"}
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}

Content = tuple[dict[str, Any], dict[str, np.ndarray]]


class NotOursError(ValueError):
    """The file is whole, but no mask file of sparse_ft."""


def parse_header(text: str | bytes) -> dict[str, Any]:
    """``{"version", "checksum", "shapes", "metadata"}`` out of a mask file's JSON, types and ranges checked.

    Only ``version`` may be anything: the caller says which it reads.

    Raises:
        ValueError: what is wrong, in one line.
    """
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict) or "version" not in header:
        raise NotOursError("it has no header")
    for key, kind, said in (("checksum", str, "text"), ("shapes", dict, "a table"), ("metadata", dict, "a table")):
        if not isinstance(header.get(key), kind):
            raise ValueError(f"its header has no '{key}' that is {said}")
    header["shapes"] = {name: _shape(name, shape) for name, shape in header["shapes"].items()}
    _check_metadata(header["metadata"])
    return header


def read_safetensors(path: Path) -> Content:
    """Header and packed bits of a ``.safetensors`` file (which checks its own sizes)."""
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(HEADER_KEY)
        names = set(file.keys())
        if text is None:
            raise NotOursError("it has no header")
        header = parse_header(text)
        _check_names(header, names)
        return header, {name: file.get_tensor(name) for name in header["shapes"]}


def read_npz(path: Path) -> Content:
    """Header and packed bits of a ``.npz`` file; one whose arrays are compressed is refused."""
    with zipfile.ZipFile(path) as file:
        members = _stored(file, path)
        if HEADER_KEY + ".npy" not in members:
            raise NotOursError("it has no header")
        header = parse_header(_npy(file, HEADER_KEY, None).tobytes())
        _check_names(header, {name.removesuffix(".npy") for name in members} - {HEADER_KEY})
        return header, {name: _npy(file, name, packed_shape(shape)) for name, shape in header["shapes"].items()}


def read_pt(path: Path) -> Content:
    """Header and packed bits of a ``.pt`` file: plain uint8 tensors, as ``torch.save`` writes them."""
    import torch

    if not zipfile.is_zipfile(path):
        raise ValueError("it is none of torch's zip files")
    with zipfile.ZipFile(path) as file:
        members = _stored(file, path)
        for name in members:
            if name.endswith("data.pkl"):
                _check_pickle(file.read(name))
    content = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(content, dict) or not isinstance(content.get(HEADER_KEY), str):
        raise NotOursError("it has no header")
    header, packed = parse_header(content[HEADER_KEY]), content.get("bits")
    if not isinstance(packed, dict):
        raise ValueError("it holds no table of bits")
    _check_names(header, set(packed))
    for name, tensor in packed.items():
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name[:200]} is no plain tensor")
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != packed_shape(header["shapes"][name]):
            raise ValueError(f"{name}: bits are {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.is_contiguous():  # a stride of 0 makes one byte as many as one likes
            raise ValueError(f"{name}: the bits are not stored one after another")
    return header, {name: tensor.numpy() for name, tensor in packed.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header names one key twice")
    return table


def _no_constant(text: str) -> float:
    raise ValueError(f"its header holds {text}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not whole or not 1 <= len(shape) <= 8 or math.prod(shape) >= 2**62 or max(shape) >= 2**62:
        raise ValueError(f"the shape of {name[:200]} is none of a weight: {str(shape)[:60]}")
    return tuple(shape)


def _check_metadata(about: Mapping[str, Any]) -> None:
    for key in _NUMBERS:
        value = about.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"its {key} is {str(value)[:60]!r}, not a number between 0 and 1")
    for key in _TEXTS:
        if not isinstance(about.get(key, ""), str):
            raise ValueError(f"its {key} is {str(about[key])[:60]!r}, not text")
    calibration = about.get("calibration") or {}
    if not isinstance(calibration, dict) or any(type(calibration.get(key, 0)) is not int for key in _COUNTS):
        raise ValueError(f"its calibration is {str(calibration)[:60]}, not a table with numbers of samples and tokens")
    tuning = about.get("reconstruction") or {}
    numbers = [tuning.get(key, 0) for key in _TUNING] if isinstance(tuning, dict) else [None]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers):
        raise ValueError(f"its reconstruction is {str(tuning)[:60]}, not a table with numbers of epochs and samples")
    notes = about.get("notes") or []
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError("its notes are no list of texts")


def _check_names(header: Mapping[str, Any], found: set[Any]) -> None:
    different = found ^ set(header["shapes"])
    if different:
        one = min(map(str, different))
        raise ValueError(f"bits and shapes name different tensors, such as {one[:200]}")


def _stored(file: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive that cannot grow when it is read: none compressed, none twice, no bytes shared."""
    members = {info.filename: info for info in file.infolist()}
    if len(members) < len(file.infolist()):
        raise ValueError("it holds one name twice")
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename[:200]} is compressed; mask files are written with numpy.savez")
    if sum(info.file_size for info in members.values()) > path.stat().st_size:
        raise ValueError("it claims more bytes than it has")
    return members


def _npy(file: zipfile.ZipFile, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """One uint8 array of an archive, its own header compared with the bytes that there are."""
    with file.open(name + ".npy") as stream:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name[:200]}: numpy's format {version} is unknown")
        found, fortran, dtype = readers[version](stream)
        if shape is None and math.prod(found) > _LARGEST_HEADER:
            raise ValueError("its header is too long")
        content = stream.read()
    wanted = found if shape is None else shape
    if dtype != np.uint8 or (fortran and len(found) > 1) or found != wanted or len(content) != math.prod(found):
        raise ValueError(f"{name[:200]}: bits are {dtype} {str(found)[:60]}, in {len(content)} bytes")
    return np.frombuffer(bytearray(content), np.uint8).reshape(found)


def _check_pickle(data: bytes) -> None:
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in _CALLS or (operation.name == "GLOBAL" and argument not in _PICKLED):
            raise ValueError(f"it holds {str(argument)[:80] if argument else 'objects'}, which no mask file does")
