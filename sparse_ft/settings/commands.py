"""The parameters of the commands. The field names are the flags of ``sparse-ft NAME`` and the parameters of
``MLproject``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_ft.settings import shared
from sparse_ft.settings.executors import EXECUTORS, executors_help
from sparse_ft.settings.field import Settings, setting
from sparse_ft.settings.model import DataSettings, ModelSettings
from sparse_ft.settings.pruning import PruningSettings
from sparse_ft.settings.slurm import read_slurm, slurm_text

__all__ = [
    "FIGURES",
    "FORMATS",
    "KEEP_FORMATS",
    "TRAINERS",
    "AnalyzeConfig",
    "CerebrasConfigsConfig",
    "MaskConfig",
    "MeasureConfig",
    "MeasureSettings",
    "PackConfig",
    "PushConfig",
    "RebuildConfig",
    "SweepConfig",
    "UnpackConfig",
    "ValidateConfig",
]

FIGURES = ("summary", "all", "none")
FORMATS = ("safetensors", "npz", "pt")
KEEP_FORMATS = ("plain", "packed")
TRAINERS = ("local", "cerebras")


@dataclass(frozen=True)
class MaskConfig(PruningSettings, DataSettings, ModelSettings):
    """Makes masks of exactly the asked sparsities, with statistics and figures."""

    format: str = setting("safetensors", "file format of the masks.", choices=FORMATS, masks=True)
    figures: str = setting(
        "summary",
        "one figure of all levels (summary), also a histogram and a heatmap of every level (all), or none.",
        choices=FIGURES,
    )
    output_dir: str = setting("outputs/masks", "folder for masks, statistics and figures.", path=(), result=False)
    shrink: bool = setting(
        False, "also write every level as a plain, smaller checkpoint (method structured or experts, scope layer)."
    )


@dataclass(frozen=True)
class ValidateConfig(Settings):
    """Proves, weight by weight, that a checkpoint is as sparse as its masks. Exit status 1 if it is not."""

    checkpoint: str = setting(help="a folder, or a models:/ or runs:/ URI of a logged model.", path=())
    masks: str = setting(help="the mask file that the checkpoint must obey.", path=())
    tolerance: float = setting(0.0, "largest magnitude that still counts as zero.")
    report: str | None = setting(None, "JSON file for the per-layer report, or none.", path=())


@dataclass(frozen=True)
class AnalyzeConfig(Settings):
    """Turns the runs of a study into tables, figures, a report page and curve runs."""

    experiment: str | None = setting(None, "name of the experiment to read, or none for the one of parent_run_id.")
    parent_run_id: str | None = setting(None, "the study to read, or none for the whole experiment.")
    baseline: str | None = setting(None, "CSV of published results to compare with, or none.", path=("builtin",))
    output_dir: str = setting("outputs/analysis", "folder for tables, figures and the page.", path=())


@dataclass(frozen=True)
class RebuildConfig(Settings):
    """Makes the merged checkpoint of a cell again, bit for bit, from the adapter and the masks that its run holds."""

    run_id: str = setting(help="the cell's run.")
    output_dir: str = setting("outputs/rebuilt", "folder for the checkpoint.", path=())


@dataclass(frozen=True)
class MeasureSettings(Settings):
    """How bytes and speeds of a model's forms are measured."""

    prompt_tokens: int = setting(128, "tokens of the prompts that are read.", least=1)
    new_tokens: int = setting(32, "tokens that are written after each.", least=1)
    repeats: int = setting(5, "measurements, after one to warm up; the median is taken.", least=1)
    dtype: str = shared.dtype()
    device: str = shared.device()
    batches: tuple[int, ...] = setting((1, 8), "sequences at once.", flag=False)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(MeasureSettings):
    """Measures what sparsity buys: bytes and tokens per second of every form that a model has under its masks."""

    checkpoint: str = setting(help="the folder of a plain checkpoint, masked or not yet.", path=())
    masks: str = setting(help="its mask file.", path=())
    report: str | None = setting(None, "JSON file for what was measured, or none.", path=())


@dataclass(frozen=True)
class PackConfig(Settings):
    """Packs a checkpoint: the weights that its masks keep, and one bit for every weight, without the zeros."""

    checkpoint: str = setting(help="the folder of the sparse checkpoint.", path=())
    masks: str = setting(help="its mask file: every weight that it prunes is +0.0 in the checkpoint.", path=())
    output: str = setting("outputs/packed", "folder for the packed checkpoint.", path=())


@dataclass(frozen=True)
class UnpackConfig(Settings):
    """Writes the plain checkpoint of a packed one again, bit for bit."""

    checkpoint: str = setting(help="the folder of the packed checkpoint.", path=())
    output: str = setting("outputs/unpacked", "folder for the plain checkpoint.", path=())


@dataclass(frozen=True)
class PushConfig(Settings):
    """Uploads a cell's model, its masks and its card to the hub. Exit status 1 if it is not as sparse as its masks."""

    run: str = setting(help="the cell's run.")
    to: str = setting(help="the repository, owner/name; it is made where there is none.")
    private: bool = setting(True, "make the repository private, and push into no public one.")


@dataclass(frozen=True)
class CerebrasConfigsConfig(Settings):
    """Writes a ModelZoo trainer configuration for every cell of a study."""

    config: str = setting(help="the study's YAML file (see configs/).", path=())
    output_dir: str = setting(
        "outputs/cerebras",
        "folder for the configurations; masks, data and start checkpoints are expected in it.",
        path=(),
    )
    settings: str | None = setting(
        None, "YAML file with python, device, retries and cluster, or none for the defaults.", path=()
    )


@dataclass(frozen=True)
class SweepConfig(Settings):
    """Runs a study: every cell of a configuration as a child run under one parent."""

    config: str = setting(help="the study's YAML file (see configs/).", path=())
    executor: str = setting("serial", executors_help(), choices=tuple(EXECUTORS))
    trainer: str | None = setting(
        None,
        "how cells are trained: where they run (local), or on a Cerebras cluster (cerebras); none leaves that to the"
        " study's file.",
        choices=TRAINERS,
    )
    max_workers: int | None = setting(
        None, "number of workers, or none for as many as the executor finds sensible (one per GPU).", least=1
    )
    resume: str | None = setting(
        None,
        "id of the parent run to resume; none resumes an unfinished study of the same configuration in the same"
        " experiment, where there is one; new starts afresh.",
    )
    dry_run: bool = setting(False, "print the plan and stop.")
    output_dir: str = setting("outputs", "folder for masks, models and reports.", path=())
    cell_seconds: float | None = setting(None, "longest time for a cell, or none for no limit.")
    max_retries: int = setting(1, "how often a cell is tried again whose worker was lost or that took too long.")
    retry: str | None = setting(
        None,
        "failure classes that are tried again on resuming beside those that always are, such as"
        " bug,validation_failed; or none.",
    )
    ray_address: str | None = setting(
        None, "a running Ray cluster to join (auto finds one), or none for one on this machine."
    )
    slurm: Mapping[str, Any] | None = setting(
        None,
        "what executor submitit asks SLURM for, such as {partition: gpu, time: 1440, gpus_per_node: 1}, or none.",
        read=read_slurm,
        write=slurm_text,
    )
    cerebras: str | None = setting(
        None, "YAML file that says where trainer cerebras trains (see docs/cerebras.md), or none.", path=()
    )
