"""Which model and which data."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_ft.settings import shared
from sparse_ft.settings.field import Settings, setting

__all__ = ["DataSettings", "ModelSettings"]


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model, where it runs and in which precision."""

    model: str = setting(
        "smollm2-135m",
        "hub id (owner/name, or owner/name@commit), local folder, or built-in (smollm2-135m, tiny-llama, and a tiny-..."
        " of every other family).",
        path=("smollm2-135m",),
        needed=True,
        named=True,
    )
    dtype: str = shared.dtype()
    device: str = shared.device()


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which task, and where its rows are."""

    task: str = setting(
        "boolq",
        "boolq, hellaswag, gsm8k, or another task of lm-eval; calibration text is taken from it too.",
        needed=True,
    )
    data_dir: str | None = setting(
        None,
        "folder with TASK/SPLIT.jsonl, packaged (BoolQ, and PIQA and HellaSwag to score), or none for the hub.",
        path=("made", "packaged"),
        needed=True,
        named=True,
        behind="scored_data",
    )
    include_path: str | None = setting(
        None,
        "folder with YAML files that define tasks as lm-eval's do, which come before its own; or none.",
        path=(),
        needed=True,
        named=True,
        behind="versions",
        later=True,
    )
