"""A set of masks: one bit per weight, keyed by the checkpoint's tensor names, with an identity.

Bits are numpy arrays: making, reading and comparing masks needs no torch; torch is imported where a mask is asked for
as a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = [
    "MaskSet",
    "combine_digests",
    "count_kept",
    "pack_bits",
    "packed_shape",
    "tensor_digest",
    "unpack_bits",
    "unpacked",
]


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed bits of a mask of ``shape``: the last axis takes ceil(C/8) bytes."""
    return (*shape[:-1], (shape[-1] + 7) // 8)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Packs a boolean mask ``[..., C]`` into ``uint8 [..., ceil(C/8)]``, little-endian, rows padded with 0."""
    import torch

    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The boolean mask ``[..., columns]`` of packed bits ``uint8 [..., ceil(columns/8)]``; True = kept."""
    import torch

    return torch.from_numpy(unpacked(packed.detach().cpu().numpy(), columns))


def unpacked(packed: np.ndarray, columns: int) -> np.ndarray:
    """`unpack_bits` of an array: bool ``[..., columns]``."""
    return np.unpackbits(packed, axis=-1, count=columns, bitorder="little").view(np.bool_)


def count_kept(packed: np.ndarray) -> int:
    """Number of set bits in ``uint8`` packed bits, without unpacking them."""
    flat = np.ascontiguousarray(packed).reshape(-1)
    whole = flat.size // 8 * 8
    count = int(np.bitwise_count(flat[:whole].view(np.uint64)).sum()) if _HAS_BITCOUNT else _table_count(flat[:whole])
    return count + _table_count(flat[whole:])


_HAS_BITCOUNT = hasattr(np, "bitwise_count")  # numpy >= 2; the Cerebras environment has 1.25


def _table_count(flat: np.ndarray) -> int:
    table = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
    return int(np.bincount(flat, minlength=256) @ table)


def tensor_digest(packed: np.ndarray) -> bytes:
    """SHA-256 of one tensor's packed bits (32 bytes)."""
    return hashlib.sha256(memoryview(np.ascontiguousarray(packed)).cast("B")).digest()


def combine_digests(tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> str:
    """The identity of a mask set from ``name -> (shape, tensor_digest)``, as 64 hex digits.

    One SHA-256 over (name, shape, SHA-256 of the bits) in name order. Hashing the bits per tensor first
    lets a streaming writer, or several threads, take the tensors in any order.
    """
    identity = hashlib.sha256()
    for name in sorted(tensors):
        shape, digest = tensors[name]
        identity.update(json.dumps([name, list(shape)], ensure_ascii=False).encode() + b"\n" + digest)
    return identity.hexdigest()


class MaskSet(Mapping[str, "torch.Tensor"]):
    """Masks by checkpoint tensor name, kept packed; ``masks[name]`` unpacks one (bool, True = kept).

    ``bits[name]`` is ``uint8 [..., ceil(C/8)]``, and ``packed[name]`` the same memory as a tensor. Iterates in name
    order. ``metadata`` says how the set came about (method, importance, scope, sparsity asked, model, fingerprint,
    calibration, seed, version); it is no part of the identity.

    Raises:
        ValueError: packed bits that are not uint8, do not fit their shape, or are set beyond a row's end.
    """

    def __init__(
        self,
        packed: Mapping[str, torch.Tensor | np.ndarray],
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, Any] | None = None,
    ):
        if set(packed) != set(shapes):
            raise ValueError(f"packed bits and shapes name different tensors: {set(packed) ^ set(shapes)}")
        self.shapes = {name: tuple(int(n) for n in shapes[name]) for name in sorted(shapes)}
        self.bits = {name: np.ascontiguousarray(packed[name]) for name in self.shapes}
        self.metadata = dict(metadata or {})
        for name, shape in self.shapes.items():
            _check_packed(name, self.bits[name], shape)

    @classmethod
    def from_bool(cls, masks: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> MaskSet:
        """A set from boolean tensors of two or more dimensions.

        Raises:
            TypeError: a mask that is not boolean (a 0/1 float mask has no agreed meaning here).
        """
        import torch

        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"mask {name} is {mask.dtype}, not torch.bool (True = kept)")
        packed = {name: pack_bits(mask) for name, mask in masks.items()}
        return cls(packed, {name: tuple(mask.shape) for name, mask in masks.items()}, metadata)

    @classmethod
    def all_kept(cls, shapes: Mapping[str, tuple[int, ...]]) -> MaskSet:
        """The masks of a model that is not pruned."""
        whole = {name: np.ones(shape, np.bool_) for name, shape in shapes.items()}
        return cls({name: np.packbits(mask, axis=-1, bitorder="little") for name, mask in whole.items()}, shapes)

    @cached_property
    def packed(self) -> dict[str, torch.Tensor]:
        """The packed bits as tensors, which share their memory."""
        import torch

        return {name: torch.from_numpy(bits) for name, bits in self.bits.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack_bits(self.packed[name], self.shapes[name][-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.n_weights} weights, sparsity {self.sparsity:.4f})"

    def __reduce__(self):  # Mapping has no state of its own; workers receive sets by pickle
        return (MaskSet, (self.bits, self.shapes, self.metadata))

    def weights(self, name: str) -> int:
        """Number of weights under the mask ``name``."""
        return int(np.prod(self.shapes[name], dtype=np.int64))

    def kept(self, name: str) -> int:
        """Number of kept weights of one tensor."""
        return self._kept[name]

    @cached_property
    def _kept(self) -> dict[str, int]:
        return {name: count_kept(bits) for name, bits in self.bits.items()}

    @property
    def n_weights(self) -> int:
        """Weights under all masks."""
        return sum(self.weights(name) for name in self)

    @property
    def n_pruned(self) -> int:
        """Weights that the masks set to zero."""
        return self.n_weights - sum(self._kept.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under masks that is pruned; 0.0 for an empty set."""
        return self.n_pruned / self.n_weights if self.n_weights else 0.0

    @cached_property
    def checksum(self) -> str:
        """The identity: see `combine_digests`."""
        return combine_digests({name: (self.shapes[name], tensor_digest(self.bits[name])) for name in self})


def _check_packed(name: str, packed: np.ndarray, shape: tuple[int, ...]) -> None:
    if packed.dtype != np.uint8 or packed.shape != packed_shape(shape):
        raise ValueError(f"{name}: bits are {packed.dtype} {packed.shape}, not uint8 {packed_shape(shape)}")
    spare = shape[-1] % 8
    if spare and packed.size and int(packed[..., -1].max()) >> spare:
        raise ValueError(f"{name}: bits are set beyond the end of a row")
