"""``push``: a cell's model to the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from sparse_ft.errors import UserError
from sparse_ft.progress import shown_progress
from sparse_ft.settings.commands import PushConfig

__all__ = ["push"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def push(config: PushConfig) -> int:
    """Uploads checkpoint, masks and card of a cell, if the checkpoint obeys its masks. Returns 0, or 1 where it does
    not, and then nothing is uploaded."""
    if not _REPOSITORY.fullmatch(config.to):
        raise UserError(f"to is '{config.to}'; it must be owner/name, a model repository of the hub.")
    from sparse_ft.cell.push import pack, upload
    from sparse_ft.tracking.record import Tag
    from sparse_ft.tracking.runs import Tracker

    tracker = Tracker.reading(run_id=config.run)
    with tempfile.TemporaryDirectory() as scratch:
        parcel = pack(tracker, config.run, config.to, Path(scratch), shown_progress())
        print("\n".join(parcel.validation.lines()))
        if not parcel.validation.ok:
            print("not pushed: the checkpoint does not obey its masks")
            return 1
        commit = upload(parcel, config.to, config.private)
    tracker.log(parcel.run.run_id, tags={Tag.PUSHED_TO: f"{config.to}@{commit}"})
    print(f"pushed: {config.to} ({'private' if config.private else 'as it is or was made'}), commit {commit}")
    return 0
