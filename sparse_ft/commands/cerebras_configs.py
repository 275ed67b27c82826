"""Trainer configurations of a whole study, for whoever starts the trainings by hand or by a scheduler."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sparse_ft.cell.masks import mask_file
from sparse_ft.cerebras.config import create_sparse_config, write_config
from sparse_ft.cerebras.trainer import CerebrasSettings, check_trainable, load_settings, trainer_plan
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.levels import LevelPaths
from sparse_ft.models.catalog import locate_config
from sparse_ft.models.skeleton import config_values
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import CerebrasConfigsConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.settings.modes import MODES
from sparse_ft.study.plan import Plan, PlannedCell, make_plan
from sparse_ft.study.study_file import load_study

__all__ = ["cerebras_configs", "write_study_configs"]


def cerebras_configs(config: CerebrasConfigsConfig) -> int:
    """Writes the configurations and says how many. Returns 0."""
    settings = load_settings(config.settings)
    files = write_study_configs(config.config, config.output_dir, settings)
    print(f"{len(files)} configurations in {config.output_dir}; index.json lists them with their masks and data.")
    return 0


def write_study_configs(study: str | Path, output_dir: str | Path, settings: CerebrasSettings) -> list[Path]:
    """One ``cells/NAME/fit.yaml`` per cell, and ``index.json`` over all.

    Nothing but the models' ``config.json`` is read: masks, data and start checkpoints have their places in the
    folder and may be made later (mode ``full`` needs its masks now: their sparsities stand in the file).

    Args:
        study: the study's YAML.
        output_dir: where everything goes.
        settings: device and cluster.

    Returns:
        the configurations, in the order of the study.

    Raises:
        UserError: a cell that ModelZoo cannot take (the message names it), or a model whose configuration is missing.
    """
    plan, root = make_plan(load_study(study)), Path(output_dir).absolute()
    for cell in plan.configs:  # all of them, before the first is written
        with _named(cell):
            cell.check()
            check_trainable(cell, _model_config(cell.model), settings)
    files, index = [], []
    for planned in plan.cells:
        cell = planned.config
        if not MODES[cell.mode].trains:
            continue
        with _named(cell):
            masks = _masks(planned, plan, root)
            path = _write(cell, masks, root, settings)
        files.append(path)
        entry = {"title": planned.title, "config": str(path), "masks": str(masks) if masks else None}
        index.append({**entry, "key": cell.key()})
    write_json(root / "index.json", index)
    return files


@contextmanager
def _named(cell: CellConfig) -> Iterator[None]:
    """Says which cell cannot be had."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{cell.title}: {error}") from None


def _write(cell: CellConfig, masks: Path | None, root: Path, settings: CerebrasSettings) -> Path:
    config, model = _model_config(cell.model), _slug(cell.model)  # two models may end alike
    folder = root / "cells" / f"{_slug(cell.title)}-{cell.key()[:8]}"
    hf_config = root / "models" / model / "config.json"
    if not hf_config.exists() or json.loads(hf_config.read_text(encoding="utf-8")) != config:
        write_json(hf_config, config)
    plan = trainer_plan(cell, config, settings.device, settings.cluster)
    # What the rows of a training are: cells that differ in any of it must not read each other's.
    rows = [cell.data_dir or "none", *filter(None, [cell.include_path]), cell.seed, plan.max_steps, plan.batch_size]
    rows_name = f"{cell.max_seq_len}-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]}"
    written = create_sparse_config(
        config,
        root / "data" / model / cell.task / rows_name,
        masks,
        cell.mode,
        hf_config=hf_config,
        start=folder / "start.mdl",
        model_dir=folder / "model_dir",
        plan=plan,
        masks_exist=not MODES[cell.mode].lora,
    )
    return write_config(folder / "fit.yaml", written)


def _masks(planned: PlannedCell, plan: Plan, root: Path) -> Path | None:
    """Where a cell's masks are or will be: a given file's place, or one that no other mask set of the study has."""
    cell = planned.config
    if cell.pruned and cell.masks is not None:
        return Path(mask_file(cell.masks).file.path).absolute()
    if planned.masks is None:
        return None
    made = plan.mask_sets[planned.masks]
    values = {name: value for name, value in plain_values(made.config).items() if name != "figures"}
    folder = f"{made.name}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"
    return LevelPaths.of(root / "masks" / folder, cell.sparsity, made.config.label).masks


def _slug(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-")


@cache
def _model_config(model: str) -> Mapping[str, Any]:
    return config_values(locate_config(model))
