"""The typed parameters of every entry point. No torch here, so that a wrong value is refused at once.

The field names are the flags of ``sparse-ft NAME`` and the parameters of ``MLproject``; the
``Args`` sections below are their help texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_ft.levels import parse_levels
from sparse_ft.settings.modes import MODES

__all__ = [
    "TRAINERS",
    "AnalyzeConfig",
    "CerebrasConfigsConfig",
    "MaskConfig",
    "RebuildConfig",
    "SweepConfig",
    "ValidateConfig",
]

Count = int | Literal["none"]
Mode = Literal[tuple(MODES)]
Method = Literal["unstructured", "structured", "random", "semi_structured"]
Importance = Literal["magnitude", "gradient", "taylor", "wanda", "sparsegpt"]
Scope = Literal["global", "layer", "row"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Rounding = Literal["dithered", "nearest"]
TRAINERS = ("local", "cerebras")


@dataclass(frozen=True)
class MaskConfig:
    """Makes masks of exactly the asked sparsities, with statistics and histograms.

    Args:
        model: hub id (owner/name, or owner/name@commit), local folder, or built-in (smollm2-135m, tiny-llama,
            tiny-mistral, tiny-mixtral).
        method: which weights may go: single ones, whole channels and heads, at random, or N of M.
        importance: what decides which weights go (random needs none).
        scope: one threshold over the model (global), per tensor (layer) or per output row (row).
        sparsities: levels as a list 0.5,0.7 or as a range 0:0.9:0.1 that includes both ends.
        pattern: kept:group for semi_structured masks, such as 2:4.
        allocation: uniform, or owl: layers with more outliers keep more (layer scope).
        task: where calibration text comes from, for importances that need any.
        data_dir: folder with TASK/SPLIT.jsonl, packaged (BoolQ from a wheel), or none for the hub.
        calibration_samples: number of calibration sequences.
        calibration_seq_len: tokens of each calibration sequence.
        format: file format of the masks.
        output_dir: folder for masks, statistics and histograms.
        seed: of random masks and of the calibration sample.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: of the model where one is built.
        force: allow combinations that are known to collapse (global wanda).
        shrink: also write every level as a plain, smaller checkpoint (method structured, scope layer).
    """

    model: str = "smollm2-135m"
    method: Method = "unstructured"
    importance: Importance = "magnitude"
    scope: Scope = "layer"
    sparsities: str = "0.5"
    pattern: str = "2:4"
    allocation: Literal["uniform", "owl"] = "uniform"
    task: str = "boolq"
    data_dir: str = "none"
    calibration_samples: int = 64
    calibration_seq_len: int = 256
    format: Literal["safetensors", "npz", "pt"] = "safetensors"
    output_dir: str = "outputs/masks"
    seed: int = 0
    device: str = "auto"
    dtype: Dtype = "auto"
    force: bool = False
    shrink: bool = False

    @property
    def levels(self) -> tuple[float, ...]:
        """The asked sparsities, ascending."""
        return parse_levels(self.sparsities)


@dataclass(frozen=True)
class ValidateConfig:
    """Proves, weight by weight, that a checkpoint is as sparse as its masks. Exit status 1 if it is not.

    Args:
        checkpoint: a folder, or a models:/ or runs:/ URI of a logged model.
        masks: the mask file that the checkpoint must obey.
        tolerance: largest magnitude that still counts as zero.
        report: JSON file for the per-layer report, or none.
    """

    checkpoint: str
    masks: str
    tolerance: float = 0.0
    report: str = "none"


@dataclass(frozen=True)
class AnalyzeConfig:
    """Turns the runs of a study into tables, figures, a report page and curve runs.

    Args:
        experiment: name of the experiment to read, or none for the one of parent_run_id.
        parent_run_id: the study to read, or none for the whole experiment.
        baseline: CSV of published results to compare with, or none.
        output_dir: folder for tables, figures and the page.
    """

    experiment: str = "none"
    parent_run_id: str = "none"
    baseline: str = "none"
    output_dir: str = "outputs/analysis"


@dataclass(frozen=True)
class RebuildConfig:
    """Makes the merged checkpoint of a cell again, bit for bit, from the adapter and the masks that its run holds.

    Args:
        run_id: the cell's run.
        output_dir: folder for the checkpoint.
    """

    run_id: str
    output_dir: str = "outputs/rebuilt"


@dataclass(frozen=True)
class SweepConfig:
    """Runs a study: every cell of a configuration as a child run under one parent.

    Args:
        config: the study's YAML file (see configs/).
        executor: where cells run: one after another here (serial), in worker processes on this machine
            (process), or on a Ray cluster (ray).
        trainer: how cells are trained: where they run (local), or on a Cerebras cluster (cerebras); none leaves
            that to the study's file.
        max_workers: number of workers, or none for as many as the executor finds sensible (one per GPU).
        resume: id of the parent run to resume; none resumes an unfinished study of the same
            configuration in the same experiment, where there is one; new starts afresh.
        dry_run: print the plan and stop.
        output_dir: folder for masks, models and reports.
        cell_seconds: longest time for a cell, or none for no limit.
        max_retries: how often a cell is tried again whose worker was lost or that took too long.
        retry: failure classes that are tried again on resuming beside those that always are, such as
            bug,validation_failed; or none.
        ray_address: a running Ray cluster to join (auto finds one), or none for one on this machine.
        cerebras: YAML file that says where trainer cerebras trains (see docs/cerebras.md), or none.
    """

    config: str
    executor: Literal["serial", "process", "ray"] = "serial"
    trainer: Literal[("none", *TRAINERS)] = "none"
    max_workers: Count = "none"
    resume: str = "none"
    dry_run: bool = False
    output_dir: str = "outputs"
    cell_seconds: float | Literal["none"] = "none"
    max_retries: int = 1
    retry: str = "none"
    ray_address: str = "none"
    cerebras: str = "none"


@dataclass(frozen=True)
class CerebrasConfigsConfig:
    """Writes a ModelZoo trainer configuration for every cell of a study.

    Args:
        config: the study's YAML file (see configs/).
        output_dir: folder for the configurations; masks, data and start checkpoints are expected in it.
        settings: YAML file with python, device, retries and cluster, or none for the defaults.
    """

    config: str
    output_dir: str = "outputs/cerebras"
    settings: str = "none"
