"""A cell on a Cerebras cluster: everything but the training runs here, the training runs in ModelZoo's environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sparse_ft.cell.run import CellResult, _Clock, _log_scores, _log_untuned, _log_validation, _masks, _Scores
from sparse_ft.cell.settings import check_cell, count, lora_settings, training_settings
from sparse_ft.cell.workbench import Workbench
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
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.cerebras.checkpoint import CerebrasCheckpoint
from sparse_ft.models.cerebras.mdl import MdlFile
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model, load_state_into, resolve_device, resolve_dtype
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.tasks.examples import training_examples
from sparse_ft.validation import validate_checkpoint

__all__ = ["CerebrasSettings", "check_trainable", "load_settings", "run_cerebras_cell", "trainer_plan"]


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


def load_settings(path: str | Path = "none") -> CerebrasSettings:
    """Settings from a YAML file with the fields of `CerebrasSettings`; ``none`` gives the defaults.

    Raises:
        UserError: no such file, or a field that does not exist.
    """
    if str(path) == "none":
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
    if cell.lora_dropout and MODES[cell.mode].lora:
        raise UserError("lora_dropout must be 0 on a Cerebras: the masked update is part of the weight.")
    settings = lora_settings(cell)
    return TrainerPlan(
        max_steps=cell.max_steps,
        batch_size=cell.batch_size * cell.gradient_accumulation,
        learning_rate=cell.learning_rate,
        warmup_fraction=cell.warmup_fraction,
        weight_decay=cell.weight_decay,
        lora=LoraPlan.of(config, settings.r, settings.alpha, settings.target_modules),
        seed=cell.seed,
        device=device,
        cluster=cluster,
    )


def check_trainable(cell: CellConfig, config: Mapping[str, Any], settings: CerebrasSettings) -> None:
    """Checks what can be known from the cell and its model's ``config.json``, before anything is made.

    Raises:
        UserError: a model or a setting that ModelZoo's trainer cannot take.
    """
    model_section(config)
    trainer_plan(cell, config, settings.device, settings.cluster)


def run_cerebras_cell(
    cell: CellConfig,
    mask_file: MaskFile | None,
    bench: Workbench,
    folder: Path,
    settings: CerebrasSettings,
    follow: Callable[[Step], None] = lambda step: None,
    labels: tuple[str, ...] = (),
    name: str = "",
) -> CellResult:
    """Runs a cell: masks -> ``.mdl`` -> configuration -> ``cszoo fit`` -> masked merge -> convert -> validate -> score.

    Args:
        cell, mask_file, bench, folder, name: as of `sparse_ft.cell.run.run_cell`.
        follow: called with every line of progress of the training, as it comes.
        labels: of the cluster's job, ``key=value``.

    Raises:
        UserError: what preflight finds, or a cell that ModelZoo cannot take.
        TrainerError: the training failed, with the class of the failure.
        ValidationFailedError: the merged checkpoint breaks what the mode promises.
    """
    result, clock, mode = CellResult(), _Clock(), MODES[cell.mode]
    folder = folder.absolute()  # the trainer's paths
    folder.mkdir(parents=True, exist_ok=True)
    with clock("load"):
        check_cell(cell)
        _require(preflight(settings.python, settings.device))  # before anything is converted
        checkpoint, tokenizer = bench.checkpoint(cell.model), bench.tokenizer(cell.model)
        result.tags.update(bench.identity(cell.model))
        plan = trainer_plan(cell, checkpoint.config, settings.device, settings.cluster)
        task = bench.task(cell.task, cell.data_dir, count(cell.num_fewshot))
        start = checkpoint if mask_file is None or mask_file.checkpoint is None else Checkpoint(mask_file.checkpoint)
        masks = _masks(mask_file, start, checkpoint, False, result)
        needed = training_settings(cell).examples_needed
        examples = training_examples(task, tokenizer, cell.max_seq_len, needed, cell.seed)
    scores = _Scores(cell, name or cell.title, bench, tokenizer, task, folder)
    if cell.score_untuned:
        with clock("load"), bench.borrow(cell) as model:
            if start is not checkpoint:
                load_state_into(model, start, start.prunable)
            if masks is not None:
                apply_masks(model, masks)
            with clock("eval_untuned"):
                _log_untuned(result, scores, model, start, masks)

    config = _prepare(cell, plan, start, masks, examples, tokenizer.pad_token_id, folder, settings, bench, clock)
    _require(preflight(settings.python, settings.device, yaml.safe_load(config.read_text(encoding="utf-8"))))
    bench.progress.start("train", cell.max_steps, "steps")
    with clock("train"):
        trained = run_fit(
            fit_command(settings.python, config, settings.device, labels),
            folder / "fit.log",
            folder / "model_dir",
            lambda step: (bench.progress.advance(1, f"loss {step.loss:.3f}"), follow(step)),
            settings.retries,
            trainer_environment(settings.python),
        )
    bench.progress.stop()
    _log_training(result, trained, cell, settings, folder, config)

    with clock("merge"):
        scaling = plan.lora.scaling if mode.lora else None
        merged = merge_checkpoint(
            trained.checkpoint, folder / "merged.mdl", checkpoint.config, cell.mode, masks, scaling, bench.progress
        )
    with clock("save"):
        target = to_hugging_face(merged, checkpoint.folder, folder / "merged", python=settings.python)
        result.tags["merged_fingerprint"] = Checkpoint(target).fingerprint
    with clock("validate"):
        obeyed = MaskSet.all_kept(checkpoint.prunable_shapes()) if masks is None else masks
        validation = validate_checkpoint(
            target,
            obeyed,
            base=start.folder if mode.lora else None,
            target_modules=lora_settings(cell).target_modules,
            progress=bench.progress,
        )
        violations = _base_violations(trained.checkpoint) if mode.loses_zeros else 0
        _log_validation(result, cell, validation, violations, folder)
    with clock("eval"):
        device = resolve_device(cell.device)
        model = load_model(target, resolve_dtype(cell.dtype, device), device)
        _log_scores(result, scores(model, "score"), "")
        result.protocol.update(scores.protocol)
    if mode.loses_zeros:
        with clock("eval_remasked"):
            apply_masks(model, masks)
            _log_scores(result, scores(model, "score re-masked"), "_remasked")
    if cell.keep == "all" or cell.register_as != "none":
        result.merged = target
    else:
        shutil.rmtree(target)
    for rest in ("model.mdl", "start.mdl", "merged.mdl"):
        (folder / rest).unlink(missing_ok=True)
    shutil.rmtree(folder / "model_dir", ignore_errors=True)
    if cell.keep_samples:
        result.artifacts += [(file, "samples") for file in scores.written]
    result.metrics.update(clock.metrics())
    return result


def _require(problems: list[str]) -> None:
    if problems:
        raise UserError(" | ".join(problems))


def _prepare(
    cell: CellConfig,
    plan: TrainerPlan,
    start: Checkpoint,
    masks: MaskSet | None,
    examples: list,
    pad_token_id: int,
    folder: Path,
    settings: CerebrasSettings,
    bench: Workbench,
    clock: _Clock,
) -> Path:
    """Data, start checkpoint and configuration of a cell; returns the configuration's file."""
    with clock("convert"):
        write_examples(examples, folder / "data", cell.max_seq_len, pad_token_id, plan.batch_size, bench.progress)
        source = CerebrasCheckpoint(to_modelzoo(start.folder, folder / "model.mdl", settings.python), start.config)
        lora = plan.lora if MODES[cell.mode].lora else None
        write_start_checkpoint(source, folder / "start.mdl", masks, lora, cell.seed, bench.progress)
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


def _log_training(
    result: CellResult, trained: FitResult, cell: CellConfig, settings: CerebrasSettings, folder: Path, config: Path
) -> None:
    """What the trainer's own log says; what it does not say (tokens per second, memory) stays empty."""
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
    result.tags["cerebras_attempts"] = str(trained.attempts)
    if trained.jobs:
        result.tags["cerebras_jobs"] = ",".join(trained.jobs)
    result.artifacts += [(config, "cerebras"), (folder / "fit.log", "cerebras")]
    write_json(folder / "losses.json", [{"step": step, "loss": loss} for step, loss in trained.losses])
    result.artifacts.append((folder / "losses.json", "cerebras"))
