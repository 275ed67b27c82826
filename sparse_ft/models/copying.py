"""Checkpoints written anew: the same folder with some tensors changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder, write_json
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

__all__ = ["copy_checkpoint", "copy_other_files"]


def copy_checkpoint(
    source: Checkpoint,
    target: str | Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    progress: Progress = SILENT,
) -> Path:
    """Writes a copy of a checkpoint with ``change(name, tensor)`` applied to each of the model's own tensors.

    Goes tensor by tensor; what the checkpoint carries besides is copied byte for byte. Config, tokenizer and
    index are copied; the folder appears when it is complete. Names, shapes and dtypes must stay.

    Raises:
        ValueError: ``change`` returned another shape or dtype.
    """
    import torch

    progress.start("write checkpoint", sum(source.nbytes(name) for name in source.names), "B")
    with atomic_folder(target) as folder:
        copy_other_files(source, folder)
        for file in source.weights.files:
            own = [name for name in source.names if source.shard(name) == file]
            with open(file, "rb") as original, open(folder / file.name, "wb") as written:
                for name in sorted(own, key=source.offset):
                    tensor = source.tensor(name)
                    changed = change(name, tensor)
                    if changed.shape != tensor.shape or changed.dtype != tensor.dtype:
                        raise ValueError(f"{name}: {changed.dtype} {tuple(changed.shape)} instead of {tensor.dtype}")
                    _copy_bytes(original, written, source.offset(name) - written.tell())
                    written.write(memoryview(changed.contiguous().view(-1).view(torch.uint8).numpy()))
                    original.seek(written.tell())
                    progress.advance(source.nbytes(name))
                _copy_bytes(original, written, file.stat().st_size - written.tell())
    progress.stop()
    return Path(target)


def copy_other_files(source: Checkpoint, folder: Path) -> None:
    """Copies what lies beside the weights: the tokenizer, the index, and a config.json of plain weights.

    Weights in other files or formats stay behind, and so do their indices and ``quantization_config``.
    """
    for other in source.folder.iterdir():
        weights = other.suffix in (".safetensors", ".bin", ".pt", ".gguf")
        stray = other.name.endswith(".index.json") and other != source.weights.index
        if other.is_file() and not weights and not stray:
            shutil.copy2(other, folder / other.name)
    if "quantization_config" in source.stored_config:
        plain = {key: value for key, value in source.stored_config.items() if key != "quantization_config"}
        write_json(folder / "config.json", plain)


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count > 0:
        block = source.read(min(count, 1 << 24))
        if not block:
            raise UserError(f"{source.name} ends too early; it is truncated.")
        target.write(block)
        count -= len(block)
