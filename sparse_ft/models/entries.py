"""The tensors of a safetensors file: where each one lies, from the file's header."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparse_ft.errors import UserError

__all__ = ["Entry", "read_entries", "read_header"]

# What safetensors calls a type -> what torch calls it, and bytes.
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file, and the bytes there.

    Attributes:
        dtype: torch's name of it; None: one that is not read. stored: the type's name in the file.
        begin, end: bytes from the start of the file.
        name: the tensor's name in the file.
    """

    file: Path
    dtype: str | None
    shape: tuple[int, ...]
    begin: int
    end: int
    stored: str = ""
    name: str = ""

    @property
    def described(self) -> str:
        """Type and shape, as fingerprints take them."""
        return f"{self.dtype and f'torch.{self.dtype}'} {self.shape}"


def read_header(file: Path) -> bytes:
    """The header of a safetensors file, as it stands there.

    Raises:
        UserError: the file is truncated, or no safetensors file.
    """
    try:
        with safe_open(file, framework="np"):  # safetensors checks that header and length belong together
            pass
        with open(file, "rb") as stream:
            return stream.read(int.from_bytes(stream.read(8), "little"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read, it is truncated or no safetensors file: {error}") from None


def read_entries(file: Path, header: bytes | None = None) -> dict[str, Entry]:
    """Where the tensors of a safetensors file are, by their names.

    Args:
        file: that holds them.
        header: of the file, where it is not there yet.

    Raises:
        UserError: what `read_header` raises.
    """
    text = read_header(file) if header is None else header
    try:
        table, length = json.loads(text), len(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read, its header is no JSON: {error}") from None
    table.pop("__metadata__", None)
    entries = {}
    for name, info in table.items():
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        dtype, itemsize = _DTYPES.get(info["dtype"], (None, 0))
        shape = tuple(info["shape"])
        assert dtype is None or math.prod(shape) * itemsize == end - begin
        entries[name] = Entry(file, dtype, shape, begin, end, info["dtype"], name)
    return entries
