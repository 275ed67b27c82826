"""The project's scores beside those of lm-eval's own command line, on the same saved checkpoints and rows.

    python -m benchmarks.scores --data-dir DIR [--limit 200] [--tasks boolq] [--checkpoints pruned]

Two checkpoints are saved: the model as it is, and pruned at 50 % (magnitude, layer by layer, zeros written).
Each is scored on each task twice: by `sparse_ft.evaluation.evaluate` here, and by a process of
``python -m lm_eval run`` that knows nothing of this project. Few-shot numbers are the tasks' own (GSM8K 5);
both get the same batch size, because it shows in the last digits. DIR holds ``TASK/SPLIT.jsonl``.

What is done is kept in ``--folder`` and not run again, so it may be stopped and started. The exit status is
1 if any number differs, or any answer to any question.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.files import write_text
from sparse_ft.models.catalog import locate
from sparse_ft.models.loading import apply_masks, load_model, load_tokenizer, save_model
from sparse_ft.progress import shown_progress
from sparse_ft.pruning import MaskGenerator, PruningSettings
from sparse_ft.tasks.definitions import load_task, write_lm_eval_task

CHECKPOINTS = {"dense": 0.0, "pruned": 0.5}
TASKS = ("boolq", "hellaswag", "gsm8k")
METRICS = {
    "boolq": ("acc",),
    "hellaswag": ("acc", "acc_norm"),
    "gsm8k": ("exact_match_strict_match", "exact_match_flexible_extract"),
}


def checkpoint(model: str, sparsity: float, dtype: str, folder: Path) -> Path:
    """A saved checkpoint of ``model`` with ``sparsity`` of its prunable weights zero."""
    if not folder.is_dir():
        base = locate(model)
        loaded = load_model(base, dtype, "cpu")
        if sparsity:
            settings = PruningSettings(sparsities=(sparsity,))
            masks = MaskGenerator(base, settings).generate(folder.parent / "masks", figures="none")[0].load()
            apply_masks(loaded, masks)
        save_model(loaded, load_tokenizer(base), folder)
    return folder


def ours(saved: Path, task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Metrics and answers of this project."""
    settings = ScoringSettings(
        eval_limit=options.limit, eval_batch_size=options.batch_size, perplexity_tokens=0, keep_samples=True
    )
    model, tokenizer = load_model(saved, options.dtype, "cpu"), load_tokenizer(saved)
    result = evaluate(model, tokenizer, load_task(task, options.data_dir), settings, shown_progress())
    return {
        "metrics": result.metrics,
        "answers": _answers(result.samples),
        "version": result.protocol["task_version"],
    }


def theirs(saved: Path, task: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The same by lm-eval's command line."""
    write_lm_eval_task(task, options.data_dir, work / "tasks")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
    command += ["--model_args", f"pretrained={saved},dtype={options.dtype}", "--tasks", task]
    command += ["--include_path", str(work / "tasks"), "--limit", str(options.limit)]
    command += ["--batch_size", str(options.batch_size), "--output_path", str(work / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found = json.loads(max((work / "out").rglob("results*.json")).read_text(encoding="utf-8"))
    lines = max((work / "out").rglob(f"samples_{task}_*.jsonl")).read_text(encoding="utf-8").splitlines()
    metrics = {}
    for key, value in found["results"][task].items():
        name, _, filtering = key.partition(",")
        stderr = "_stderr" if name.endswith("_stderr") else ""
        kind = "" if filtering == "none" else f"_{filtering.replace('-', '_')}"
        metrics[f"{name.removesuffix('_stderr')}{kind}{stderr}"] = value
    samples = [json.loads(line) for line in lines]
    return {
        "metrics": metrics,
        "answers": _answers(samples),
        "version": found["versions"][task],
        "command": " ".join(command),
    }


def _answers(samples: list[dict[str, Any]]) -> list[list[Any]]:
    """[question, filter, what the model said] as JSON has it: log-likelihoods in full, or texts.

    lm-eval writes the numbers of its records as strings, so both sides are made strings.
    """
    found = [[sample["doc_id"], sample["filter"], _texts(sample["resps"])] for sample in samples]
    return sorted(found, key=lambda answer: (answer[0], answer[1]))


def _texts(value: Any) -> Any:
    return [_texts(part) for part in value] if isinstance(value, (list, tuple)) else str(value)


def kept(file: Path, make: Any) -> dict[str, Any]:
    """The JSON in ``file``, made first where it is not there."""
    if not file.is_file():
        write_text(file, json.dumps(make()))
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("outputs/scores"), help="checkpoints and results")
    options = parser.parse_args()
    kind = f"{options.dtype}-{options.batch_size}-{options.limit}"
    print(
        f"{options.model}, {options.dtype}, batch size {options.batch_size}, first {options.limit} questions, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {platform.machine()}\n"
    )
    print("| checkpoint | task | metric | ours | lm-eval | equal | answers equal |")
    print("|---|---|---|---:|---:|---|---:|", flush=True)
    different = 0
    for task in options.tasks:
        for name in options.checkpoints:
            saved = checkpoint(options.model, CHECKPOINTS[name], options.dtype, options.folder / options.dtype / name)
            work = options.folder / f"{name}-{task}-{kind}"
            one = kept(work / "ours.json", lambda s=saved, t=task: ours(s, t, options))
            two = kept(work / "theirs.json", lambda s=saved, t=task, w=work: theirs(s, t, options, w))
            pairs = list(zip(one["answers"], two["answers"], strict=True))
            alike = sum(first == second for first, second in pairs)
            different += alike != len(pairs)
            for metric in METRICS[task]:
                mine, other = ([m["metrics"][f"{metric}{end}"] for end in ("", "_stderr")] for m in (one, two))
                different += mine != other
                print(
                    f"| {name} | {task} v{two['version']} | {metric} | {mine[0]!r} ± {mine[1]!r} | "
                    f"{other[0]!r} ± {other[1]!r} | {'yes' if mine == other else 'NO'} | {alike} of {len(pairs)} |",
                    flush=True,
                )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
