"""Runs with made-up numbers from smooth formulas: for the tests of the analysis, never for a document."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from sparse_ft.analysis.table import SCORED_AFTER
from sparse_ft.tracking.record import Run

TOLERANCE = {"unstructured": 0.75, "semi_structured": 0.6, "structured": 0.45, "random": 0.3}
DENSE_ACCURACY = {"boolq": 0.84, "hellaswag": 0.72, "gsm8k": 0.36}
FLOOR = {"boolq": 0.5, "hellaswag": 0.25, "gsm8k": 0.0}


def cell(
    model: str = "synthetic-a",
    task: str = "boolq",
    method: str = "unstructured",
    sparsity: float = 0.5,
    mode: str = "sparse_to_sparse",
    seed: int = 0,
    importance: str = "magnitude",
    status: str = "FINISHED",
    start: int = 1_700_000_000,
    params: dict[str, str] | None = None,
    metrics: dict[str, float] | None = None,
    tags: dict[str, str] | None = None,
) -> Run:
    """A cell that ran for two and a half minutes; ``params``, ``metrics``, ``tags`` override."""
    key = f"{model}|{task}|{method}|{importance}|{sparsity}|{mode}|{seed}"
    number = zlib.crc32(key.encode())
    rng = np.random.default_rng(number)
    dense = mode == "dense"
    run = Run(
        run_id=f"{number:08x}{start % 10**8:08d}",
        name=key,
        status=status,
        parent_run_id="study",
        start_time=start,
        end_time=start + 150 if status != "RUNNING" else None,
        params={
            "cfg/model": model,
            "cfg/task": task,
            "cfg/method": "none" if dense else method,
            "cfg/importance": "none" if dense else importance,
            "cfg/scope": "none" if dense else "layer",
            "cfg/sparsity": str(sparsity),
            "cfg/mode": mode,
            "cfg/seed": str(seed),
            "cfg/lora_r": "8",
            "cfg/learning_rate": "0.0002",
        },
        tags={"kind": "cell", "cell_key": f"key-{number:08x}", "mask_checksum": "" if dense else f"{number:064x}"},
    )
    if status == "FINISHED":
        run.params.update(_protocol(task))
        run.metrics.update(_scores(task, method, sparsity, mode, rng))
    elif status == "FAILED":
        run.tags.update(failure_class="out_of_memory", failure_message="asked for 12.1 GB, 7.9 GB are free")
    run.params.update(params or {})
    run.metrics.update(metrics or {})
    run.tags.update(tags or {})
    return run


def study(
    models: Sequence[str] = ("synthetic-a", "synthetic-b"),
    tasks: Sequence[str] = ("boolq", "hellaswag", "gsm8k"),
    methods: Sequence[str] = ("unstructured", "structured", "random"),
    levels: Iterable[float] = tuple(level / 10 for level in range(10)),
    modes: Sequence[str] = ("sparse_to_dense", "sparse_to_sparse"),
    seeds: Sequence[int] = (0,),
    dense: bool = True,
    importance: str = "magnitude",
) -> list[Run]:
    """The full grid: by default 360 cells beside one dense baseline a (model, task)."""
    levels = tuple(levels)
    rows = [Run("study", "study", "FINISHED", start_time=1, end_time=2, tags={"kind": "study"})]
    for model in models:
        for task in tasks:
            for seed in seeds:
                if dense:
                    rows.append(cell(model, task, sparsity=0.0, mode="dense", seed=seed))
                rows += [cell(model, task, method, level, mode, seed, importance)
                         for method in methods for level in levels for mode in modes]  # fmt: skip
    return rows


def demo() -> list[Run]:
    """The demo's shape: one model, one task, dense, and unstructured 50 % and 70 % in two modes."""
    return study(("smollm2-135m",), ("boolq",), ("unstructured",), (0.5, 0.7))


def demo_scored() -> list[Run]:
    """The demo itself: two rules and the dense model, untrained; one of them recovered and tuned; PIQA beside BoolQ."""
    name, recovered = "smollm2-135m", {"eval/perplexity": 33.3, "eval/perplexity_stderr": 1.5}
    recovered |= {
        "eval/loss_recovered": 3.36,
        "eval/perplexity_recovered": 33.2,
        "eval/perplexity_stderr_recovered": 1.5,
    }
    before = {"eval/perplexity_untuned": 40.8, "eval/perplexity_stderr_untuned": 1.9}
    as_it_is = {name.removesuffix("_untuned"): value for name, value in before.items()}
    alps = {"importance": "alps", "mode": "pruned", "metrics": as_it_is}
    runs = [
        cell(name, sparsity=0.0, mode="dense"),
        cell(name, sparsity=0.0, mode="pruned", metrics={"eval/perplexity": 22.6, "eval/perplexity_stderr": 2.4}),
        cell(name, mode="pruned", metrics={"eval/perplexity": 387.0, "eval/perplexity_stderr": 58.0}),
        cell(name, **alps),
        cell(name, importance="alps", metrics=before | recovered),
    ]
    for run in runs:
        run.params.update({"protocol/score/piqa": "split=validation; samples=300; chance=0.5"})
        for after in SCORED_AFTER[:3] if run.params["cfg/mode"] != "pruned" else ("",):
            value = 0.627 if after == "" else 0.6
            run.metrics.update({f"eval/piqa/accuracy{after}": value, f"eval/piqa/accuracy_stderr{after}": 0.028})
            run.metrics.update({f"eval/mean_accuracy{after}": value, f"eval/mean_accuracy_stderr{after}": 0.028})
    return runs


def _scores(task: str, method: str, sparsity: float, mode: str, rng: np.random.Generator) -> dict[str, float]:
    level = 0.0 if mode == "dense" else sparsity
    bend = TOLERANCE[method] + (0.05 if mode == "sparse_to_dense" else 0.0)
    kept = 1 / (1 + math.exp((level - bend) / 0.07))
    kept_untuned = 1 / (1 + math.exp((level - bend + 0.2) / 0.06))
    floor, dense = FLOOR.get(task, 0.25), DENSE_ACCURACY.get(task, 0.7)
    accuracy = max(0.0, floor + (dense - floor) * kept + rng.normal(0, 0.008))
    untuned = floor + (0.8 * dense - floor) * kept_untuned
    perplexity = 9 * math.exp(5 * (1 - kept))
    merged = 0.001 if mode == "sparse_to_dense" and level > 0 else level
    metrics = {
        "sparsity/target": level,
        "sparsity/achieved": level,
        "sparsity/after_merge": merged,
        "sparsity/violations": 0.0,
        "eval/accuracy": accuracy,
        "eval/accuracy_stderr": math.sqrt(max(accuracy * (1 - accuracy), 1e-4) / 500),
        "eval/loss": 0.5 + 2 * (1 - kept),
        "eval/loss_stderr": 0.03,
        "eval/perplexity": perplexity,
        "eval/perplexity_stderr": 0.05 * perplexity,
        "eval/accuracy_untuned": untuned,
        "eval/accuracy_stderr_untuned": math.sqrt(max(untuned * (1 - untuned), 1e-4) / 500),
        "eval/perplexity_untuned": 11 * math.exp(8 * (1 - kept_untuned)),
        "eval/perplexity_stderr_untuned": math.exp(8 * (1 - kept_untuned)),
        "eval/samples_per_second": 40 + 30 * level + rng.normal(0, 1),
        "measure/masked/decoding_tokens_per_second_batch_8": 30.0,
        "measure/shrunk/decoding_tokens_per_second_batch_8": 40 + 10 * level,
        "measure/masked/disk_bytes": 4e6,
        "measure/packed/disk_bytes": 4e6 * (1.07 - level),
        "train/loss": 0.4 + (1 - kept),
        "train/tokens_per_second": 900 - 200 * (mode == "sparse_to_sparse") + rng.normal(0, 10),
        "memory/peak_bytes": 2.4e9,
        "time/training_seconds": 60.0,
    }
    if mode == "sparse_to_dense":
        metrics["eval/accuracy_remasked"] = floor + (accuracy - floor) * (1 - 0.5 * level)
        metrics["eval/accuracy_stderr_remasked"] = metrics["eval/accuracy_stderr"]
        metrics["eval/perplexity_remasked"] = perplexity * (1 + level)
        metrics["eval/perplexity_stderr_remasked"] = 0.05 * perplexity * (1 + level)
    if task == "hellaswag":
        metrics["eval/acc_norm"] = accuracy + 0.03
    return metrics


def _protocol(task: str) -> dict[str, str]:
    shots = {"gsm8k": "5"}.get(task, "0")
    return {
        "protocol/task_version": "2.0",
        "protocol/num_fewshot": shots,
        "protocol/limit": "500",
        "protocol/split": "validation",
        "protocol/n_scored": "500",
        "protocol/lm_eval_version": "0.4.13",
        "protocol/perplexity_corpus": f"{task}:validation",
        "protocol/perplexity_seq_len": "256",
        "protocol/perplexity_tokens": "16384",
        "protocol/device": "cpu",
        "protocol/dtype": "float32",
        "protocol/batch_size": "8",
    }
