"""``rebuild``: the merged checkpoint of a cell again, from what its run holds."""

from __future__ import annotations

from pathlib import Path

from sparse_ft.cell.rebuild import rebuild as rebuild_checkpoint
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.progress import shown_progress
from sparse_ft.settings.commands import RebuildConfig
from sparse_ft.tracking.runs import Tracker

__all__ = ["rebuild"]


def rebuild(config: RebuildConfig) -> int:
    """Writes the merged checkpoint of a cell again, from its adapter and masks. Returns 0."""
    target = Path(config.output_dir)
    if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
        raise UserError(f"{target} holds something else than a checkpoint; choose another output_dir.")
    rebuild_checkpoint(Tracker(), config.run_id, target, Workbench(shown_progress()))
    print(f"rebuilt, bit for bit: {target}")
    return 0
