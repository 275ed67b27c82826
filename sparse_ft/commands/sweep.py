"""``sweep``: a study, or a search."""

from __future__ import annotations

from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.study_file import load_study

__all__ = ["sweep"]


def sweep(config: SweepConfig) -> int:
    """Runs a study to its end, or resumes one; see `sparse_ft.study.driver.sweep`."""
    load_study(config.config)  # a file that is no study is answered before what runs studies is imported
    from sparse_ft.study.driver import sweep as run

    return run(config)
