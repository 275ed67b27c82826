"""``pack`` and ``unpack``: a checkpoint without its pruned weights, and the plain one again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sparse_ft.masks.files import load_masks
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.packed import PackedCheckpoint
from sparse_ft.models.packing import pack_checkpoint, unpack_checkpoint
from sparse_ft.progress import shown_progress
from sparse_ft.settings.commands import PackConfig, UnpackConfig

__all__ = ["pack", "unpack"]


def pack(config: PackConfig) -> int:
    """Writes the packed checkpoint and says how large its files of weights are beside the plain ones. Returns 0."""
    source = Checkpoint(config.checkpoint)
    packed = pack_checkpoint(source, load_masks(config.masks), config.output, shown_progress())
    before, after = _bytes(source.weights.files), _bytes(packed.weights.files)
    print(f"packed at {packed.masks.sparsity:.2%} sparsity: {config.output}")
    print(f"  files of weights: {after:,} bytes, plain {before:,}: {before / after:.2f} times smaller")
    print(f"  identity {packed.identity[:16]}, fingerprint {packed.about['fingerprint']}")
    return 0


def unpack(config: UnpackConfig) -> int:
    """Writes the plain checkpoint of a packed one, every tensor compared with what was packed. Returns 0."""
    source = PackedCheckpoint(config.checkpoint)
    unpack_checkpoint(source, config.output, shown_progress())
    print(f"unpacked, bit for bit: {config.output} (fingerprint {source.about['fingerprint']})")
    return 0


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
