"""Trains a cell in a group of processes: adapter on, fine-tuned under the mask, merged and saved block by block."""

from __future__ import annotations

import shutil

from sparse_ft.cell.group_model import GroupModel
from sparse_ft.cell.live import named
from sparse_ft.cell.local import log_training
from sparse_ft.cell.training import Trained, Training
from sparse_ft.settings.modes import MODES

__all__ = ["train_in_group"]


def train_in_group(training: Training) -> Trained:
    """What `sparse_ft.cell.local.train_here` does, by all members at once.

    Raises:
        NonFiniteLossError: training diverged.
        MemberLostError: one of the group is gone.
    """
    cell, mode, model, clock = training.cell, MODES[training.cell.mode], training.model, training.clock
    assert isinstance(model, GroupModel)
    group, folder, target = model.group, training.folder, str(training.target.resolve())
    with clock("train"):
        member, progress = group.member, training.progress
        member.progress = progress
        member.report = lambda step, values: progress.measured(step, named("train", values))
        about = {"examples": list(training.examples), "pad": training.tokenizer.pad_token_id}
        trained = group.do("train", cell=cell, scratch=str(folder / "trainer"), **about)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    log_training(training.result, trained, timed=True)
    if cell.keep != "none" and mode.lora:
        group.do("save_adapter", folder=str(folder / "adapter"))
        training.result.artifacts.append((folder / "adapter", "adapter"))
    violations = group.do("base_violations") if mode.loses_zeros else 0
    with clock("eval_adapter"):
        adapter = None if mode.masked_update else training.scores.answers(model)
    with clock("merge"):  # and written, which is one thing here
        group.do("merge", cell=cell, target=target)
    return Trained(model, violations, exact=mode.masked_update, adapter=adapter)
