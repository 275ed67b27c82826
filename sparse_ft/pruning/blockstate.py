"""What a block-by-block run has reached, on disk after every block, so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparse_ft.files import atomic_path, write_json

__all__ = ["UNPRUNED", "BlockState"]

UNPRUNED = "unpruned"  # the stream of the dense model


class BlockState:
    """A folder with the results of finished blocks and the hidden states that the next one needs.

    The folder's name holds a digest of ``identity``: another model, text or setting has another folder, and
    the same run finds its own.

    Args:
        parent: where the folder goes.
        identity: everything the results depend on (JSON-able).
    """

    def __init__(self, parent: str | Path, identity: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = Path(parent) / f".blocks-{digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done = 0
        self.notes: list[str] = []
        if self._file.is_file():
            reached = json.loads(self._file.read_text(encoding="utf-8"))
            self.done, self.notes = reached["blocks_done"], reached["notes"]

    def hidden(self, block: int, stream: int | str) -> Path:
        """File of the hidden states that enter ``block``."""
        return self.folder / f"hidden_{block}_{stream}.bin"

    def save(self, block: int, stream: int, results: Mapping[str, torch.Tensor]) -> None:
        """Keeps the results of one block and stream; they count once the block is finished."""
        with atomic_path(self._results(block, stream)) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in results.items()}, temporary)

    def tensor(self, block: int, stream: int, name: str) -> torch.Tensor:
        """One of the results of a block and stream."""
        with safe_open(self._results(block, stream), framework="pt") as file:
            return file.get_tensor(name)

    def note(self, text: str) -> None:
        """Remembers a remark for the run's metadata, once."""
        if text not in self.notes:
            self.notes.append(text)

    def finish(self, block: int) -> None:
        """The block is done: the next run begins after it."""
        self.done = block + 1
        write_json(self._file, {"blocks_done": self.done, "notes": self.notes})
        for old in self.folder.glob("hidden_*.bin"):
            if int(old.name.split("_")[1]) <= block:
                old.unlink()

    def remove(self) -> None:
        """Deletes the folder; the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _file(self) -> Path:
        return self.folder / "state.json"

    def _results(self, block: int, stream: int) -> Path:
        return self.folder / f"block_{block}_{stream}.safetensors"
