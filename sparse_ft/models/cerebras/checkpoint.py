"""A Cerebras checkpoint seen as the Hugging Face checkpoint of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_ft.errors import UserError
from sparse_ft.models.cerebras.mdl import MdlFile
from sparse_ft.models.cerebras.names import Place, places, strip_prefix
from sparse_ft.models.checkpoint import Checkpoint, reading_from
from sparse_ft.models.entries import Entry
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import place
from sparse_ft.models.skeleton import config_values

__all__ = ["CerebrasCheckpoint", "listed_names", "read_listed"]


class CerebrasCheckpoint(Checkpoint):
    """A ``.mdl`` file under Hugging Face's names, shapes and row order, one tensor in memory at a time.

    What reads a `Checkpoint` (masks, validation, fingerprints) reads this, with the same masks and checksums as
    from the Hugging Face checkpoint of these weights. The architecture comes from ``config.json`` of the Hugging
    Face model, beside the file or one folder up.

    Args:
        path: a ``.mdl`` of ModelZoo's converter, of its trainer, or of this project.
        config: the content of ``config.json``; None looks for the file.

    Raises:
        UserError: no such file, a damaged or foreign one, no ``config.json``, or a LoRA that is not merged yet.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None):
        self.file = MdlFile(path)
        self.folder = Path(path)
        self.__dict__["config"] = dict(config) if config is not None else _find_config(Path(path))
        self.__dict__["stored_config"] = self.config
        own = strip_prefix(self.file.entries)
        if any(name.endswith((".lora_A", ".lora_B")) for name in own):
            raise UserError(
                f"{path} holds a LoRA beside its weights: merge it first (merge_checkpoint of"
                " sparse_ft.cerebras.checkpoint)."
            )
        self._places: dict[str, Place] = places(self.config)
        if self.config.get("tie_word_embeddings"):
            self._places.pop(architecture_of(self.config).head_weight)
        missing = sorted(name for name, place in self._places.items() if place.name not in own)
        if missing:
            raise UserError(
                f"{path} lacks {self._places[missing[0]].name} ({len(missing)} tensors are missing). Do the file and"
                " its config.json belong together?"
            )
        self._keys = {name: own[place.name] for name, place in self._places.items()}
        self._stored = {name: self._make_entry(name) for name in self._places}

    @property
    def names(self) -> list[str]:
        """All tensors: the file's others are ModelZoo's own."""
        return sorted(self._stored)

    stored_names = names

    @property
    def carried(self) -> list[str]:
        return []

    def _check_plain(self) -> None:
        """Done on opening, as far as ModelZoo needs it."""

    _check_whole = _check_plain

    def _make_entry(self, name: str) -> Entry:
        entry, place = self.file.entries[self._keys[name]], self._places[name]
        shape = entry.shape if place.expert is None else (entry.shape[0], entry.shape[2])
        size = int(np.prod(shape)) * entry.dtype.itemsize
        return Entry(self.folder, str(entry.dtype).removeprefix("torch."), shape, 0, size)

    def tensor(self, name: str) -> torch.Tensor:
        self._entry(name)
        place = self._places[name]
        return place.from_modelzoo(self.file.read(self._keys[name], place.index)).contiguous()

    def raw(self, name: str) -> np.ndarray:
        return self.tensor(name).reshape(-1).view(torch.uint8).numpy()

    def offset(self, name: str) -> int:
        raise UserError(f"{self.folder} is a Cerebras checkpoint: its tensors are no plain runs of bytes.")

    def reading(self, name: str) -> AbstractContextManager[Callable[[np.ndarray, int], None]]:
        return reading_from(self.raw(name))


def listed_names(source: Checkpoint, names: Iterable[str]) -> list[str]:
    """Those of the names that a checkpoint has, or that are of a mixture, whose experts it may have fused."""
    present, experts = set(source.names), architecture_of(source.config).experts
    return [name for name in names if name in present or (experts is not None and f".{experts.stored}." in name)]


def read_listed(source: Checkpoint, name: str) -> torch.Tensor:
    """One of `listed_names`, wherever a checkpoint holds it: transformers 5 fuses experts, and renames their router.

    Raises:
        UserError: it is not there.
    """
    if name in source.names:
        return source.tensor(name)
    slot, experts = place(source.config, name), architecture_of(source.config).experts
    for parameter in (slot.parameter, slot.parameter.replace(f".{experts.module}.", f".{experts.stored}.")):
        if parameter in source.names:
            return slot.view(source.tensor(parameter))
    return source.tensor(name)  # raises, naming it


def _find_config(path: Path) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        file = folder / "config.json"
        if file.is_file():
            return config_values(file)
    raise UserError(
        f"There is no config.json beside {path} or one folder up: copy the one of the Hugging Face model there, it"
        " tells the architecture."
    )
