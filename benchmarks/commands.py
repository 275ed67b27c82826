"""Whole processes of the commands: seconds beside the goals, and how much of them is imports.

    python benchmarks/commands.py [--rounds 3] [--skip-1b]

Every command runs in a fresh process on a store and a cache that exist. The time of the imports is that of a process
that does nothing but import what the command had loaded at its end. Goals are for a quiet machine with two cores; the
seconds of processor time say more where it is not quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = "0:0.9:0.1"
# LLaMA-3.2-1B: 1.24 billion weights, 2.5 GB in bfloat16.
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
# What a process prints at its end: the modules that it has, in the order in which they came.
REPORT = "import atexit, json, sys; atexit.register(lambda: open({!r}, 'w').write(json.dumps(list(sys.modules))));"


@dataclass(frozen=True)
class Case:
    """A command: its arguments, the seconds that it may take, and the exit status that it must have."""

    title: str
    argv: tuple[str, ...]
    goal: float
    status: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every command; the median is printed")
    parser.add_argument("--skip-1b", action="store_true", help="leave out the 1B checkpoint (2.5 GB of disk)")
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = small_cases(folder) if args.skip_1b else [*small_cases(folder), big_case(folder)]
        print(f"{'command':44} {'seconds':>8} {'goal':>6} {'imports':>8} {'cpu':>6}")
        for case in cases:
            measure(case, folder, 1)  # the store, the cache and the compiled kernels exist
            seconds, imports, cpu = measure(case, folder, args.rounds)
            print(f"{case.title:44} {seconds:8.2f} {case.goal:6.1f} {imports:8.2f} {cpu:6.2f}", flush=True)


def small_cases(folder: Path) -> list[Case]:
    """Wrong input, tiny-llama's masks, their validation, and the plan of a study of it."""
    masks = folder / "masks"
    study = folder / "study.yaml"
    study.write_text(
        "grid: {model: [tiny-llama], task: [boolq], sparsity: [0.5, 0.7]}\n"
        "cell: {data_dir: made, dtype: float32, device: cpu}\n"
    )
    make = ("compute_masks", "--model=tiny-llama", f"--sparsities={LEVELS}", f"--output_dir={masks}")
    tiny = "from sparse_ft.models.catalog import locate; print(locate('tiny-llama'))"
    model = subprocess.run([sys.executable, "-c", tiny], capture_output=True, text=True, check=True, cwd=ROOT)
    dense = (
        "validate",
        f"--checkpoint={model.stdout.strip()}",
        f"--masks={masks}/masks_sparsity0_unstructured.safetensors",
    )
    return [
        Case("wrong input (validate, no such masks)", ("validate", "--checkpoint=x", "--masks=gone.npz"), 1.5, 2),
        Case("wrong input (sweep, no such study)", ("sweep", "--config=gone.yaml"), 1.5, 2),
        Case("compute_masks, tiny-llama, ten levels", make, 4.0),
        Case("validate, tiny-llama", dense, 3.0),
        Case("sweep --dry_run, tiny-llama", ("sweep", f"--config={study}", "--dry_run"), 3.0),
    ]


def big_case(folder: Path) -> Case:
    """The masks of random weights in the shape of a 1B model."""
    model = folder / "one-billion"
    write_model(model)
    argv = ("compute_masks", f"--model={model}", f"--sparsities={LEVELS}", f"--output_dir={folder / 'big'}")
    return Case("compute_masks, 1B in bfloat16, ten levels", argv, 8.0)


def write_model(folder: Path) -> None:
    """A LLaMA checkpoint of random weights, tensor by tensor; no tokenizer, which masks by weight do not need."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shutil.disk_usage(folder.parent).free < 8e9:
        raise SystemExit("the 1B checkpoint and its masks take some 5 GB of disk; give --skip-1b")
    config = LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shapes.pop("lm_head.weight")  # tied
    torch.manual_seed(0)
    save_to = folder / "model.safetensors"
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: torch.empty(shape, dtype=torch.bfloat16).normal_() for name, shape in shapes.items()}, save_to)


def measure(case: Case, folder: Path, rounds: int) -> tuple[float, float, float]:
    """Median seconds of the command's process and of one that only imports the same modules, and the command's median
    seconds of processor time."""
    report = folder / "modules.json"
    work = f"from sparse_ft.cli import run; sys.exit(run({case.argv[0]!r}, {list(case.argv[1:])!r}, 'sparse-ft'))"
    whole = [timed(REPORT.format(str(report)) + work, folder, case.status) for _ in range(rounds)]
    names = [name for name in json.loads(report.read_text()) if not name.startswith("__") and "." not in name]
    own = [name for name in json.loads(report.read_text()) if name.startswith("sparse_ft.")]
    imports = f"import contextlib, importlib\nfor name in {names + own!r}:\n    with contextlib.suppress(Exception):\n"
    imports += "        importlib.import_module(name)"
    importing = [timed(imports, folder, 0) for _ in range(rounds)]
    seconds, cpu = (statistics.median(values) for values in zip(*whole, strict=True))
    return seconds, statistics.median(wall for wall, _ in importing), cpu


def timed(code: str, folder: Path, status: int) -> tuple[float, float]:
    """Seconds of a fresh interpreter that runs ``code``, on the clock and of processors.

    Raises:
        SystemExit: it ended with another status.
    """
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)}
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | store, cwd=folder
    )
    seconds, after = time.perf_counter() - began, os.times()
    if done.returncode != status:
        raise SystemExit(f"ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
