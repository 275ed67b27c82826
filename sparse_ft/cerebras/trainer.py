"""Trains cells on a Cerebras cluster: everything but the training runs here, that runs in ModelZoo's environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from sparse_ft.cell.live import named
from sparse_ft.cell.training import Trained, Training, Watch
from sparse_ft.cerebras.checkpoint import LoraPlan, merge_checkpoint, write_start_checkpoint
from sparse_ft.cerebras.config import Cluster, TrainerPlan, create_sparse_config, write_config
from sparse_ft.cerebras.convert import to_hugging_face, to_modelzoo
from sparse_ft.cerebras.data import write_examples
from sparse_ft.cerebras.logs import Step
from sparse_ft.cerebras.model_section import model_section
from sparse_ft.cerebras.preflight import preflight
from sparse_ft.cerebras.runner import FitResult, fit_command, run_fit, trainer_environment
from sparse_ft.errors import UserError
from sparse_ft.files import load_yaml, write_json
from sparse_ft.masks.files import save_masks
from sparse_ft.models.cerebras.checkpoint import CerebrasCheckpoint
from sparse_ft.models.cerebras.mdl import MdlFile
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_state_into
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.modes import MODES
from sparse_ft.settings.rules import EXPERTS
from sparse_ft.tracking.record import Tag

__all__ = [
    "CerebrasSettings",
    "CerebrasTrainer",
    "check_trainable",
    "load_settings",
    "settings_of_try",
    "trainer_plan",
]


@dataclass(frozen=True)
class CerebrasSettings:
    """Where cells are trained.

    Attributes:
        python: the interpreter of the environment with ModelZoo.
        device: ``CSX``, or ``CPU`` to try everything without a cluster.
        retries: further tries after a lost connection.
        cluster: wafers, mounts, labels, time limit.
    """

    python: str = field(default_factory=lambda: os.environ.get("SPARSE_FT_CEREBRAS_PYTHON", sys.executable))
    device: str = "CSX"
    retries: int = 2
    cluster: Cluster = field(default_factory=Cluster)


def load_settings(path: str | Path | None = None) -> CerebrasSettings:
    """Settings from a YAML file with the fields of `CerebrasSettings`; None gives the defaults.

    Raises:
        UserError: no such file, or a field that does not exist.
    """
    if path is None:
        return CerebrasSettings()
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"Cerebras settings {path} cannot be read: {error}") from None
    cluster = content.pop("cluster", None) or {}
    for kind, values in ((CerebrasSettings, content), (Cluster, cluster)):
        unknown = sorted(set(values) - {entry.name for entry in fields(kind)})
        if unknown:
            raise UserError(f"Cerebras settings {path}: unknown field '{unknown[0]}'.")
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in cluster.items()}
    return CerebrasSettings(**content, cluster=Cluster(**lists))


def trainer_plan(cell: CellConfig, config: Mapping[str, Any], device: str, cluster: Cluster) -> TrainerPlan:
    """How the cell is trained on ModelZoo.

    Raises:
        UserError: what ModelZoo cannot do: some projections only, dropout under a mask, SparseGPT's own weights.
    """
    if cell.gpus_per_cell > 1:
        raise UserError("gpus_per_cell must be 1 on a Cerebras, where the cluster shares a model out itself.")
    if cell.lora_dropout and MODES[cell.mode].lora:
        raise UserError("lora_dropout must be 0 on a Cerebras: the masked update is part of the weight.")
    return TrainerPlan(
        max_steps=cell.max_steps,
        batch_size=cell.batch_size * cell.gradient_accumulation,
        learning_rate=cell.learning_rate,
        warmup_fraction=cell.warmup_fraction,
        weight_decay=cell.weight_decay,
        lora=LoraPlan.of(config, cell.lora_r, cell.lora_alpha, cell.target_modules),
        seed=cell.seed,
        device=device,
        cluster=cluster,
    )


def check_trainable(cell: CellConfig, config: Mapping[str, Any], settings: CerebrasSettings) -> None:
    """Checks what can be known from the cell and its model's ``config.json``, before anything is made.

    Raises:
        UserError: a model or a setting that ModelZoo's trainer cannot take.
    """
    if cell.recovered or cell.has_teacher:
        raise UserError("recovery and a teacher are trained here, not on a Cerebras; take trainer local")
    if MODES[cell.mode].trains:
        if cell.sources != (TASK,):
            raise UserError("rows of one's own (train_data) are trained on here, not on a Cerebras; take trainer local")
        for name in ("num_epochs", "schedule", "rslora", "loss_on", "packing"):
            if cell.canonical().get(name) is not None:  # said where it matters and is not the default
                raise UserError(f"{name} is {getattr(cell, name)}, which trainer local alone can.")
        if cell.pruned and cell.method == EXPERTS:
            raise UserError("method experts trains a smaller model, which is none of ModelZoo's; take trainer local.")
        model_section(config)
        trainer_plan(cell, config, settings.device, settings.cluster)


@dataclass(frozen=True)
class CerebrasTrainer:
    """Trains in ModelZoo's environment, and merges here: ``.mdl`` -> configuration -> ``cszoo fit`` -> masked merge ->
    Hugging Face folder. The adapter is not kept, nor scored before the merge."""

    settings: CerebrasSettings

    name, can_stop, takes_all = "cerebras", False, True

    def check(self, cell: CellConfig, checkpoint: Checkpoint) -> None:
        """Refuses what ModelZoo cannot train: some models, single projections, dropout under a mask."""
        try:
            check_trainable(cell, checkpoint.config, self.settings)
        except UserError as error:
            raise UserError(f"{cell.model} cannot be trained on a Cerebras: {error}") from None

    def missing(self) -> list[str]:
        """See `sparse_ft.cerebras.preflight.preflight`."""
        return preflight(self.settings.python, self.settings.device)

    def train(self, training: Training) -> Trained:
        """Trains with ModelZoo's trainer, and puts the merged weights into the model in memory.

        Raises:
            UserError: what preflight finds in the configuration, or what ModelZoo's converter says.
            TrainerError: the training failed, with the class of the failure.
        """
        cell, clock, progress = training.cell, training.clock, training.progress
        mode, settings = MODES[cell.mode], settings_of_try(self.settings, cell, training.watch)
        folder = training.folder.absolute()  # the trainer's paths
        plan = trainer_plan(cell, training.base.config, settings.device, settings.cluster)
        with clock("convert"):
            config = _prepare(training, plan, settings, folder)
        if missing := preflight(settings.python, settings.device, yaml.safe_load(config.read_text(encoding="utf-8"))):
            raise UserError(" | ".join(missing))
        progress.start("train", cell.max_steps, "steps")
        with clock("train"):
            trained = run_fit(
                fit_command(settings.python, config, settings.device, _labels(settings, training)),
                folder / "fit.log",
                folder / "model_dir",
                lambda step: _follow(training, step),
                settings.retries,
                trainer_environment(settings.python),
            )
        progress.stop()
        _log(training, trained, settings, folder, config)
        with clock("validate"):
            base_violations = _base_violations(trained.checkpoint) if mode.loses_zeros else 0
        with clock("merge"):
            scaling = plan.lora.scaling if mode.lora else None
            merged = merge_checkpoint(
                trained.checkpoint, folder / "merged.mdl", training.base.config, cell.mode, training.masks, scaling,
                progress,
            )  # fmt: skip
        with clock("save"):
            to_hugging_face(merged, training.base.folder, training.target, python=settings.python)
        load_state_into(training.model, training.target)
        for rest in ("model.mdl", "start.mdl", "merged.mdl"):
            (folder / rest).unlink(missing_ok=True)
        shutil.rmtree(folder / "model_dir", ignore_errors=True)
        return Trained(training.model, base_violations)


def settings_of_try(settings: CerebrasSettings, cell: CellConfig, watch: Watch) -> CerebrasSettings:
    """The settings for this try of a cell: one that ran out of memory computes fewer sequences at a time.

    The step has as many as before, so without saying so the second try would be the first.
    """
    if not watch.reduced:
        return settings
    return replace(settings, cluster=replace(settings.cluster, micro_batch_size=cell.batch_size))


def _labels(settings: CerebrasSettings, training: Training) -> tuple[str, ...]:
    run_id = training.watch.run_id
    return (*settings.cluster.job_labels, *([f"mlflow_run={run_id}"] if run_id else []))


def _follow(training: Training, step: Step) -> None:
    """Shows a line of progress, and hands its numbers on to the run."""
    training.progress.advance(1, f"loss {step.loss:.3f}")
    values = {"cerebras/loss": step.loss, "cerebras/samples_per_second": step.rate}
    if step.kind == "Train":
        values |= named("train", {"loss": step.loss})
    training.progress.measured(step.number, {name: value for name, value in values.items() if value is not None})


def _prepare(training: Training, plan: TrainerPlan, settings: CerebrasSettings, folder: Path) -> Path:
    """Data, start checkpoint and configuration of a cell; returns the configuration's file."""
    cell, start, masks, progress = training.cell, training.start, training.masks, training.progress
    pad = training.tokenizer.pad_token_id
    write_examples(training.examples, folder / "data", cell.max_seq_len, pad, plan.batch_size, progress)
    source = CerebrasCheckpoint(to_modelzoo(start.folder, folder / "model.mdl", settings.python), start.config)
    lora = plan.lora if MODES[cell.mode].lora else None
    write_start_checkpoint(source, folder / "start.mdl", masks, lora, cell.seed, progress)
    if masks is not None:
        save_masks(masks, folder / "masks.safetensors")
    config = create_sparse_config(
        start.config,
        folder / "data",
        None if masks is None else folder / "masks.safetensors",
        cell.mode,
        hf_config=folder / "config.json",
        start=folder / "start.mdl",
        model_dir=folder / "model_dir",
        plan=plan,
    )
    return write_config(folder / "fit.yaml", config)


def _base_violations(trained: Path) -> int:
    """Masked weights of the trained base, under its adapter, that are not zero."""
    file = MdlFile(trained)
    masks = [name for name in file.entries if name.endswith("_mask")]
    return sum(int((file.read(name.removesuffix("_mask"))[~file.read(name)] != 0).sum()) for name in masks)


def _log(training: Training, trained: FitResult, settings: CerebrasSettings, folder: Path, config: Path) -> None:
    """What the trainer's own log says; what it does not say (tokens per second, memory) stays empty."""
    cell, result = training.cell, training.result
    if trained.losses:
        result.metrics["train/loss"] = sum(loss for _, loss in trained.losses) / len(trained.losses)
        result.series["train/loss_curve"] = trained.losses
    if trained.rate is not None:
        result.metrics["train/samples_per_second"] = trained.rate
    result.protocol.update(
        {
            "train_device": settings.device,
            "train_batch_size": cell.batch_size * cell.gradient_accumulation,
            "train_seq_len": cell.max_seq_len,
            "train_precision": "cbfloat16" if settings.device == "CSX" else "float32",
            "train_rate": "GlobalRate of ModelZoo's trainer",
        }
    )
    result.tags[Tag.CEREBRAS_ATTEMPTS] = str(trained.attempts)
    if trained.jobs:
        result.tags[Tag.CEREBRAS_JOBS] = ",".join(trained.jobs)
    result.artifacts += [(config, "cerebras"), (folder / "fit.log", "cerebras")]
    write_json(folder / "losses.json", [{"step": step, "loss": loss} for step, loss in trained.losses])
    result.artifacts.append((folder / "losses.json", "cerebras"))
