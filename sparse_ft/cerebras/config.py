"""Configurations of ModelZoo 2.10's trainer for every mode of a study."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_ft.cerebras.checkpoint import LoraPlan, ModelZooMasks
from sparse_ft.cerebras.model_section import model_section
from sparse_ft.errors import UserError
from sparse_ft.files import write_text
from sparse_ft.masks.files import load_masks
from sparse_ft.settings.modes import MODES, SPARSE_TO_SPARSE, TRAINED_MODES

__all__ = ["Cluster", "TrainerPlan", "check_config", "create_sparse_config", "write_config"]

_INIT_METHODS = ("random", "topk", "from_zeros", "checkerboard")
_SPARSITY_KEYS = {"algorithm", "sparsity", "schedule", "init_method", "param_filter"}
_LORA_KEYS = {"r", "alpha", "dropout", "fan_in_fan_out", "merge_weights", "target_modules"}
_LAYER_CLASS = "TransformerDecoderLayer"


@dataclass(frozen=True)
class Cluster:
    """Where and for how long a job runs on a CSX cluster.

    Attributes:
        num_csx: wafers; num_workers: processes that stream data, a wafer.
        mount_dirs: folders that the cluster must see: data, checkpoints, and this project's source.
        python_paths: folders in which the cluster's workers find Python packages.
        job_labels: ``key=value`` labels; the runner adds the MLflow run.
        job_time_sec: the job is stopped after this time in the machine (queueing does not count).
        micro_batch_size: sequences computed at a time; None lets the compiler choose.
    """

    num_csx: int = 1
    num_workers: int = 1
    mount_dirs: tuple[str, ...] = ()
    python_paths: tuple[str, ...] = ()
    job_labels: tuple[str, ...] = ()
    job_time_sec: int | None = 6 * 3600
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        for label in self.job_labels:
            if label.count("=") != 1:
                raise UserError(f"job label '{label}' must have the form key=value.")

    def section(self) -> dict[str, Any]:
        """``backend.cluster_config``."""
        section: dict[str, Any] = {"num_csx": self.num_csx, "num_workers_per_csx": self.num_workers}
        if self.job_time_sec is not None:
            section["job_time_sec"] = self.job_time_sec
        for name in ("mount_dirs", "python_paths", "job_labels"):
            if getattr(self, name):
                section[name] = list(getattr(self, name))
        return section


@dataclass(frozen=True)
class TrainerPlan:
    """How a cell is trained.

    Attributes:
        batch_size: sequences per optimizer step.
        learning_rate: peak of the linear schedule, after ``warmup_fraction`` of the steps.
        lora: the adapter (ignored by mode ``full``).
        shuffle: anew by the trainer; without it the examples come in the order of their files.
        eval_steps: batches of the validation data after training; 0 leaves it out.
        device: ``CSX`` or ``CPU``.
        precision: ``cbfloat16``, ``bfloat16``, ``float16``, or ``float32`` (no mixed precision). None: cbfloat16
            on a CSX, float32 on a CPU.
    """

    max_steps: int = 100
    batch_size: int = 8
    learning_rate: float = 2e-4
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: LoraPlan = field(default_factory=LoraPlan)
    seed: int = 0
    shuffle: bool = False
    eval_steps: int = 0
    device: str = "CSX"
    precision: str | None = None
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        if self.device not in ("CSX", "CPU"):
            raise UserError(f"device is '{self.device}'; on ModelZoo it is CSX or CPU.")
        if self.max_steps < 1 or self.batch_size < 1:
            raise UserError("max_steps and batch_size must be 1 or more.")
        if self.precision not in (None, "cbfloat16", "bfloat16", "float16", "float32"):
            raise UserError(f"precision is '{self.precision}'; it is cbfloat16, bfloat16, float16 or float32.")


def create_sparse_config(
    config: Mapping[str, Any],
    data_dir: str | Path,
    masks: str | Path | None,
    mode: str,
    *,
    hf_config: str | Path,
    start: str | Path,
    model_dir: str | Path,
    plan: TrainerPlan | None = None,
    val_data_dir: str | Path | None = None,
    masks_exist: bool = True,
) -> dict[str, Any]:
    """A trainer configuration (``trainer.init / fit / validate``) that trains a model under masks.

    ``dense``: LoRA. ``sparse_to_dense``: masked weights, LoRA as it is. ``sparse_to_sparse``: masked weights, LoRA
    masked in every forward (`SparseMask`). ``full``: every weight is trained under ModelZoo's own static sparsity,
    without custom code; the masks come with the start checkpoint.

    Args:
        config: the content of the Hugging Face model's ``config.json``.
        data_dir: folder of HDF5 files (`sparse_ft.cerebras.data`) of the task's training examples.
        masks: the mask file; None for ``dense`` only.
        hf_config: where ``config.json`` is, for the callback.
        start: the start checkpoint (`write_start_checkpoint`) with masks and adapter.
        model_dir: folder for the trainer's checkpoints and logs.
        val_data_dir: the same as ``data_dir`` for validation; None repeats the training data.
        masks_exist: False where the mask file is to be made later (not for ``full``: its sparsities stand in the
            configuration).

    Raises:
        UserError: a mode that does not exist, masks missing or superfluous, or masks that do not fit.
    """
    plan = plan or TrainerPlan()
    if mode not in TRAINED_MODES:
        raise UserError(f"mode is '{mode}', it must be one of {', '.join(TRAINED_MODES)}.")
    kind = MODES[mode]
    if (masks is not None) != kind.masked_base:
        raise UserError(f"Mode {mode} {'needs' if kind.masked_base else 'takes no'} masks.")
    model = model_section(config)
    init: dict[str, Any] = {
        "backend": {"backend_type": plan.device},
        "seed": plan.seed,
        "model_dir": str(model_dir),
        "model": model,
        "optimizer": {
            "AdamW": {"betas": [0.9, 0.999], "eps": 1.0e-8, "correct_bias": True, "weight_decay": plan.weight_decay}
        },
        "schedulers": [_schedule(plan)],
        "precision": _precision(plan),
        "loop": {"max_steps": plan.max_steps},
        "checkpoint": {"steps": plan.max_steps, "save_initial_checkpoint": False, "autoload_last_checkpoint": False},
        "logging": {"log_steps": 1},
        "callbacks": [],
    }
    if plan.eval_steps:
        init["loop"]["eval_steps"] = plan.eval_steps
    if plan.device == "CSX":
        init["backend"]["cluster_config"] = plan.cluster.section()
        if plan.cluster.micro_batch_size is not None:
            size = {"csx.performance.micro_batch_size": plan.cluster.micro_batch_size}
            init["callbacks"] += [{"ScopedTrainFlags": dict(size)}, {"ScopedValidateFlags": dict(size)}]
    if not kind.lora:
        init["sparsity"] = _static_groups(config, masks)
    else:
        init["callbacks"].append({"Lora": {"lora_params": _lora_params(model, plan.lora)}})
        if masks is not None:
            if masks_exist:
                load_masks(masks)  # a file that is damaged or missing is found here, not on the cluster
            callback = {"masks": str(masks), "hf_config": str(hf_config), "mode": mode}
            init["callbacks"].append({"SparseMask": callback})
    train = {
        "data_processor": "GptHDF5MapDataProcessor",
        "data_dir": str(data_dir),
        "batch_size": plan.batch_size,
        "shuffle": plan.shuffle,
        "shuffle_seed": plan.seed,
        "num_workers": plan.cluster.num_workers if plan.device == "CSX" else 0,
    }
    validation = {**train, "data_dir": str(val_data_dir or data_dir), "shuffle": False}
    fit = {"train_dataloader": train, "ckpt_path": str(start)}
    if plan.eval_steps:
        fit["val_dataloader"] = dict(validation)
    written = {"trainer": {"init": init, "fit": fit, "validate": {"val_dataloader": validation}}}
    check_config(written)
    return written


def check_config(config: Mapping[str, Any]) -> None:
    """Checks what ModelZoo's schema lets pass, or stumbles over late: sparsity, LoRA and the mask callback.

    Raises:
        UserError: an unknown key of ``sparsity`` or ``lora_params``, an unknown ``init_method``, a sparsity that is
            none, built-in sparsity beside a LoRA, or a LoRA that would merge without its mask.
    """
    init = config["trainer"]["init"]
    callbacks = {name: value for entry in init.get("callbacks", []) for name, value in entry.items()}
    groups = init.get("sparsity")
    if groups is not None:
        for group in [groups] if isinstance(groups, Mapping) else _listed(groups):
            _check_sparsity(group)
        if "Lora" in callbacks:
            raise UserError(
                "ModelZoo's sparsity crashes beside its Lora callback: use the SparseMask callback instead."
            )
    if "Lora" in callbacks:
        params = (callbacks["Lora"] or {}).get("lora_params")
        for entry in params if isinstance(params, list) else [params]:
            _check_lora(entry, callbacks.get("SparseMask"))
    if "SparseMask" in callbacks:
        unknown = set(callbacks["SparseMask"]) - {"masks", "hf_config", "mode"}
        if unknown or not {"masks", "hf_config"} <= set(callbacks["SparseMask"]):
            raise UserError(f"SparseMask takes masks, hf_config and mode; it has {sorted(callbacks['SparseMask'])}.")


def write_config(path: str | Path, config: Mapping[str, Any]) -> Path:
    """Writes a configuration as YAML whose first line is the command that runs it."""
    device = config["trainer"]["init"]["backend"]["backend_type"]
    head = f"# python -m sparse_ft.cerebras.modelzoo.cszoo fit {path} --target_device {device}\n"
    return write_text(path, head + yaml.safe_dump(dict(config), sort_keys=False, width=120))


def _schedule(plan: TrainerPlan) -> dict[str, Any]:
    warmup = math.ceil(plan.warmup_fraction * plan.max_steps)
    fall = {
        "LinearLR": {
            "initial_learning_rate": plan.learning_rate,
            "end_learning_rate": 0.0,
            "total_iters": max(1, plan.max_steps - warmup),
        }
    }
    if not warmup:
        return fall
    rise = {
        "LinearLR": {
            "initial_learning_rate": 0.0,
            "end_learning_rate": plan.learning_rate,
            "total_iters": warmup,
        }
    }
    return {"SequentialLR": {"schedulers": [rise, fall]}}


def _precision(plan: TrainerPlan) -> dict[str, Any]:
    kind = plan.precision or ("cbfloat16" if plan.device == "CSX" else "float32")
    clip = {"max_gradient_norm": plan.max_grad_norm}
    if kind == "float32":
        return {"enabled": False, **clip}
    scaling = 1.0 if kind == "bfloat16" else "dynamic"  # the others have too few exponent bits for small gradients
    return {"enabled": True, "fp16_type": kind, "loss_scaling_factor": scaling, **clip}


def _lora_params(model: Mapping[str, Any], lora: LoraPlan) -> dict[str, Any]:
    attention = "MultiheadAttention" if model["attention_module"] == "aiayn_attention" else "MultiQueryAttention"
    if lora.attention and lora.mlp:
        target = [_LAYER_CLASS]
    else:
        target = [_LAYER_CLASS, attention if lora.attention else "FeedForwardNetwork"]
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "r": lora.r,
        "alpha": alpha,
        "dropout": 0.0,
        "fan_in_fan_out": False,
        "merge_weights": False,
        "target_modules": target,
    }


def _static_groups(config: Mapping[str, Any], masks: str | Path) -> list[dict[str, Any]]:
    """One group of tensors for each sparsity measured on the masks, by exact names."""
    by_name = ModelZooMasks(config, load_masks(masks))
    groups: dict[float, list[str]] = defaultdict(list)
    for name in by_name:
        groups[by_name.sparsity(name)].append(f"model.{name}")
    return [
        {"algorithm": "static", "sparsity": sparsity, "init_method": "from_zeros", "param_filter": names}
        for sparsity, names in sorted(groups.items())
    ]


def _listed(groups: Any) -> Sequence[Any]:
    return groups if isinstance(groups, list) else [{"sparsity": groups}]


def _check_sparsity(group: Mapping[str, Any]) -> None:
    unknown = set(group) - _SPARSITY_KEYS
    if unknown:
        raise UserError(f"sparsity has the unknown key '{sorted(unknown)[0]}', which ModelZoo would ignore.")
    if str(group.get("algorithm", "static")).lower() != "static":
        raise UserError(f"sparsity algorithm '{group['algorithm']}': the masks of a study are static.")
    if group.get("init_method", "random") not in _INIT_METHODS:
        raise UserError(f"init_method '{group['init_method']}' is none of {', '.join(_INIT_METHODS)}.")
    value = group.get("sparsity")
    if not isinstance(value, float) or not 0.0 <= value < 1.0:
        raise UserError(f"sparsity {value!r} must be a number in [0, 1), written with a point.")


def _check_lora(params: Mapping[str, Any] | None, mask: Mapping[str, Any] | None) -> None:
    if not params:
        raise UserError("The Lora callback has no lora_params.")
    unknown = set(params) - _LORA_KEYS
    if unknown:
        raise UserError(f"lora_params has the unknown key '{sorted(unknown)[0]}'.")
    if params.get("r", 0) < 1:
        raise UserError("lora_params.r must be 1 or more: with 0 ModelZoo trains nothing.")
    if mask is not None and params.get("merge_weights"):
        raise UserError("lora_params.merge_weights must be false under masks: ModelZoo's own merge is not masked.")
    if mask is not None and mask.get("mode", SPARSE_TO_SPARSE.name) == SPARSE_TO_SPARSE.name and params.get("dropout"):
        raise UserError("lora_params.dropout must be 0 in mode sparse_to_sparse.")
    if _LAYER_CLASS not in (params.get("target_modules") or []):
        raise UserError(
            f"lora_params.target_modules must name {_LAYER_CLASS}: else embeddings and head are adapted too."
        )
