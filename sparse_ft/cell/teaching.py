"""The dense teacher of a cell: the pruned model's own base with its masks lifted, or a model loaded beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft import PeftModel
from torch import nn

from sparse_ft.lora.whole import whole_base
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.loading import load_model
from sparse_ft.settings.cell import CellConfig
from sparse_ft.training.distillation import Distillation

__all__ = ["teaching"]

_LARGEST = 1024  # of the teacher's tokens, beyond which the others count as one: a vocabulary may have 250,000


@contextmanager
def teaching(
    cell: CellConfig, teacher: Checkpoint | None, start: Checkpoint, student: nn.Module, masks: MaskSet | None
) -> Iterator[Distillation | None]:
    """The losses against a teacher, for the training of a student inside the block.

    Where an adapter is trained and the base under it is the teacher, pruned and not updated, the teacher is that base
    with its masks lifted, and takes no memory; else it is loaded beside the student, in its precision and on its
    device. What is trained is the same to the bit.

    Args:
        cell: how is taught.
        teacher: the weights; None: there is none, and no losses.
        start: those that the student began with, under ``masks``.
        student: ready to be trained.
        masks: of the student; None: it was not pruned.
    """
    if teacher is None:
        yield None
        return
    weights = {"ce": cell.teacher_ce, "kl": cell.teacher_kl, "squarehead": cell.teacher_squarehead}
    blocks = architecture_of(teacher.config).blocks
    with ExitStack() as block:
        model = None
        if masks is not None and isinstance(student, PeftModel) and teacher.folder == start.folder:
            model = block.enter_context(whole_base(student, masks, teacher))
        if model is None:
            parameter = next(student.parameters())
            model = load_model(teacher.folder, parameter.dtype, parameter.device).requires_grad_(False)
            model.config.use_cache = False  # one pass a batch
        guide = Distillation(model, blocks, **weights, temperature=cell.teacher_temperature, largest=_LARGEST)
        del model
        yield guide
        guide.teacher = None  # whoever reads the curves holds no model
