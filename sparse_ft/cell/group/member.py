"""What each process of a group does: the same as all others, with its own share of the parameters.

Whatever is public here is done by all members at once, with the same arguments; the first, who leads, has the others
told (`sparse_ft.cell.group.leader`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparse_ft.cell.start import fitted
from sparse_ft.cell.workbench import Workbench
from sparse_ft.evaluation import answer_loss, evaluate
from sparse_ft.lora.full import masked_gradients
from sparse_ft.lora.layer import MaskedBase
from sparse_ft.lora.merge import adapted_layers, adapted_parameter, merge_layers, refuse_shared
from sparse_ft.lora.model import apply_sparse_lora
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import resolve_dtype
from sparse_ft.models.hollow import hollow_model
from sparse_ft.models.loading import saved_tokenizer
from sparse_ft.models.mixtures import without_experts
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.models.sharding import (
    emptied,
    fill,
    gathered,
    nonzero_masked,
    prune_sharded,
    save_sharded,
    shard,
)
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.tasks.examples import Example
from sparse_ft.training import TrainingResult, train
from sparse_ft.training.watch import Report

__all__ = ["Member"]


class Member:
    """One process of a group.

    Args:
        rank: 0 leads.
        mesh: of the group.
        device: of this process.
        bench: finds what names stand for.

    Attributes:
        plain: the model without adapters; None before the first.
        adapted: the model that was trained last; of mode full it is ``plain``.
        progress: told how the training goes.
        report: told what every step gave.
    """

    def __init__(self, rank: int, mesh: DeviceMesh, device: torch.device, bench: Workbench):
        self.rank, self._mesh, self._device, self._bench = rank, mesh, device, bench
        self.plain: PreTrainedModel | None = None
        self.adapted: PeftModel | PreTrainedModel | None = None
        self.progress: Progress = SILENT
        self.report: Report = lambda step, values: None
        self._made: tuple[object, ...] = ()
        self._start: Checkpoint | None = None
        self._masks: MaskSet | None = None
        self._take: Callable[[], None] | None = None

    def open(self, cell: CellConfig, start: str, file: MaskFile | None, smaller: bool) -> None:
        """Has the model of a checkpoint, under its masks, as ``plain``.

        Args:
            cell: whose model it is.
            start: the checkpoint's folder.
            file: the masks; None: all weights are kept.
            smaller: the experts that the masks remove are gone from the checkpoint.
        """
        self._adapted_gone()
        self._start = open_checkpoint(start)
        self._masks = None
        if file is not None:
            source, masks = fitted(file, self._bench.checkpoint(cell.model))
            self._masks = without_experts(source.config, masks) if smaller else masks
        dtype = resolve_dtype(cell.dtype, self._device)
        made = (start, self._start.stored_config, dtype)
        if self.plain is None or self._made != made:
            self.plain = None
            gc.collect()
            self.plain, self._made = hollow_model(self._start, dtype), made
            shard(self.plain, self.plain, self._mesh)
        fill(self.plain, self._start, self._masks)

    def evaluate(self, settings: CellConfig, beside: bool) -> None:
        """Takes part in scoring ``plain``, which the leader does for itself."""
        bench = self._bench
        suite = bench.suite(settings) if beside else ()
        evaluate(self.plain, bench.tokenizer(settings.model), bench.task(settings), settings, SILENT, suite)

    def answers(self, settings: CellConfig) -> None:
        """Takes part in the loss of ``adapted`` on the right answers, which the leader computes for itself."""
        bench = self._bench
        answer_loss(self.adapted, bench.tokenizer(settings.model), bench.task(settings), settings, SILENT)

    def train(self, cell: CellConfig, examples: list[Example], pad: int, scratch: str) -> TrainingResult:
        """Trains the model of `open` in the cell's mode, as ``adapted``; ``plain`` has no weights meanwhile."""
        mode, then = MODES[cell.mode], (lambda: None)
        if mode.lora:
            self._take = emptied(self.plain)
            base = hollow_model(self._start, self._made[-1])
            torch.manual_seed(cell.seed)
            self.adapted = apply_sparse_lora(base, cell, cell.mode, self._masks, cell.seed)
            refuse_shared(base)
            for _, layer in adapted_layers(self.adapted):
                if isinstance(layer, MaskedBase):
                    layer.share_mask()
            shard(self.adapted, base, self._mesh)
            fill(base, self._start, self._masks)
        else:
            self.adapted = self.plain.requires_grad_(True)
            if self._masks is not None:
                then = masked_gradients(self.plain, self._masks)
        return train(
            self.adapted, examples, cell, Path(scratch), pad, progress=self.progress, report=self.report,
            after_backward=then,
        )  # fmt: skip

    def base_violations(self) -> int:
        """Masked weights of the base under the adapter that are not zero."""
        return nonzero_masked(self._base(), self._masks)

    def save_adapter(self, folder: str) -> None:
        """Writes the adapter as PEFT does."""
        own = {name: p for name, p in self.adapted.named_parameters() if p.requires_grad}
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in own.items()}
        if self.rank == 0:
            self.adapted.save_pretrained(folder, state_dict=whole)

    def merge(self, cell: CellConfig, target: str) -> None:
        """Merges the adapter, block by block, into the checkpoint that it writes; ``plain`` then has its weights."""

        def change(parts: list[torch.nn.Module]) -> None:
            here = {id(part) for part in parts}
            if isinstance(self.adapted, PeftModel):
                found = [pair for pair in adapted_layers(self.adapted) if id(pair[1]) in here]
                for _, layer in found:  # into memory of its own: numpy, which rounds on a CPU, would keep the group's
                    weight = adapted_parameter(layer)
                    weight.data = weight.data.clone()
                merge_layers(found, cell.rounding, cell.seed)

        self._write(self.adapted, target, change)
        self._adapted_gone()
        torch.distributed.barrier()  # the checkpoint is complete
        fill(self.plain, Checkpoint(target), None)

    def save(self, target: str) -> None:
        """Writes ``plain``."""
        self._write(self.plain, target)

    def remask(self) -> None:
        """Sets the masked weights of ``plain`` to zero."""
        prune_sharded(self.plain, self._masks)

    def _write(
        self,
        model: torch.nn.Module,
        target: str,
        change: Callable[[list[torch.nn.Module]], None] = lambda parts: None,
    ) -> None:
        plain, tokenizer = self._base(model), saved_tokenizer(self._start.folder)
        save_sharded(gathered(model, plain, change), plain, self._start, tokenizer, Path(target), self.rank == 0)

    def _base(self, model: torch.nn.Module | None = None) -> PreTrainedModel:
        model = self.adapted if model is None else model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _adapted_gone(self) -> None:
        """Gives the trained model's memory back to the plain one."""
        self.adapted = None
        gc.collect()
        if self._take is not None:
            self._take()
            self._take = None
