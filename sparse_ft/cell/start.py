"""What a cell's training starts from: the base model, what its masks come with, or the model with fewer experts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.mixtures import refitted, without_experts
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.rules import EXPERTS

__all__ = ["Start", "fitted", "starting"]


@dataclass(frozen=True)
class Start:
    """Weights, and the masks that fit them.

    Attributes:
        checkpoint: the weights.
        masks: None: all weights are kept.
        whole: the masks as they were made: of ``masks`` all, and of experts that are gone.
        smaller: whether the model has fewer experts than the base.
    """

    checkpoint: Checkpoint
    masks: MaskSet | None = None
    whole: MaskSet | None = None
    smaller: bool = False


def fitted(file: MaskFile, base: Checkpoint) -> tuple[Checkpoint, MaskSet]:
    """The weights that masks are of, and the masks by the names that these have."""
    checkpoint = base if file.checkpoint is None else Checkpoint(file.checkpoint)
    return checkpoint, refitted(checkpoint.config, file.load(), checkpoint.prunable_shapes())


@contextmanager
def starting(file: MaskFile | None, base: Checkpoint, folder: Path, progress: Progress = SILENT) -> Iterator[Start]:
    """What training under masks starts from.

    Experts that masks remove are removed before training, with the router's rows: a router sends tokens to an expert
    of zeros as well. That checkpoint is there for as long as the context is.

    Args:
        file: the masks; None: none.
        base: the cell's model.
        folder: a smaller checkpoint goes into its ``start/``.

    Raises:
        UserError: masks that do not fit.
    """
    if file is None:
        yield Start(base)
        return
    checkpoint, masks = fitted(file, base)
    check_masks(masks, checkpoint.prunable_shapes(), str(checkpoint.folder.name))
    if masks.metadata.get("method") != EXPERTS or not masks.n_pruned:
        yield Start(checkpoint, masks, masks)
        return
    from sparse_ft.pruning.shrink import shrink_checkpoint

    target = folder / "start"
    try:
        smaller = Checkpoint(shrink_checkpoint(checkpoint.folder, masks, target, progress))
        yield Start(smaller, without_experts(checkpoint.config, masks), masks, smaller=True)
    finally:
        shutil.rmtree(target, ignore_errors=True)
