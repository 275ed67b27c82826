"""One cell at real size, through the commands: seconds, peak memory and disk of every stage, beside the weights.

    python -m benchmarks.large_cell --shape llama-2-7b --folder FOLDER --data-dir DIR [--mode sparse_to_sparse]
        [--method unstructured] [--importance magnitude] [--calibration 8x64] [--steps 2] [--batch 2x64] [--questions 4]

Writes a checkpoint of that shape into FOLDER (random weights, seeded, bfloat16, in shards; once), then runs what a user
runs: ``compute_masks`` at two levels, ``train`` with the masks of the higher one (adapters on all projections, merge,
proof, scores), ``rebuild`` of the merged model from the adapter and the masks that the run holds. Memory is resident
memory of the command's processes as the kernel counts it, sampled ten times a second; pages of files that are mapped
count, though the kernel may drop them. Disk is the checkpoint and what the commands write. Goals: the
rebuilt model has the fingerprint of the merged one; memory at most the weights and 3 GB; at no time more than two
copies of the checkpoint on disk (where masks come with weights of their own, one more for each level). DIR holds
boolq/train.jsonl and boolq/validation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_tokenizer
from sparse_ft.tracking.record import Tag

ROOT = Path(__file__).resolve().parents[1]
GB = 1e9
LEVELS, SPARE_GB = (0.5, 0.7), 3
SHARD = 800_000_000  # bytes
# What their config.json says of size; everything else is transformers' own for the model type.
SHAPES = {
    "llama-2-7b": ("llama", {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
                             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}),
    "mistral-7b": ("mistral", {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
                               "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "qwen3-8b": ("qwen3", {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "head_dim": 128,
                           "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "250m": ("llama", {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816,
                       "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 16}),
}  # fmt: skip
# A line that a command writes -> the stage that begins with it.
BEGINS = {
    r"(make masks|prune blocks) \.\.\.": "masks",
    r"score untuned: .* \.\.\.": "score untuned",
    r"train \.\.\.": "train",
    r"train: \d+/(\d+) steps in": "weigh what training did",
    r"merge \.\.\.": "merge",
    r"save \.\.\.": "save",
    r"save: .* in": "fingerprint",
    r"validate \.\.\.": "validate",
    r"score: .* \.\.\.": "score",
    r"logging": "log the model",
}


@dataclass
class Seen:
    """What was seen of a stage: seconds, and the most memory and disk at any time, in bytes."""

    seconds: float = 0.0
    resident: int = 0
    own: int = 0  # resident without the pages of files
    disk: int = 0


@dataclass
class Watched:
    """Watches a command's processes and a folder while the command tells what it is at."""

    work: Path
    base: Path
    stages: dict[str, Seen] = field(default_factory=dict)
    stage: str = ""

    def run(self, argv: list[str], environment: dict[str, str]) -> None:
        """Raises SystemExit where the command fails, or was killed for want of memory."""
        self._enter(f"{argv[0]}: start")
        done = threading.Event()
        command = [sys.executable, "-c", "from sparse_ft.cli import main; main()", *argv]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=self.work) as process:
            sampler = threading.Thread(target=self._sample, args=(process.pid, done))
            sampler.start()
            for line in process.stderr:
                print(f"  {line}", end="", flush=True)
                for pattern, stage in BEGINS.items():
                    if re.match(pattern, line):
                        self._enter(stage if argv[0] == "train" or stage == "masks" else f"{argv[0]}: {stage}")
            status = process.wait()
            done.set()
            sampler.join()
        if status:
            raise SystemExit(f"{' '.join(argv)}: ended with status {status} in stage '{self.stage}'")

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self.stages.setdefault(stage, Seen())

    def _sample(self, pid: int, done: threading.Event) -> None:
        before = time.perf_counter()
        while not done.wait(0.1):
            now, stage = time.perf_counter(), self.stages[self.stage]
            stage.seconds += now - before
            before = now
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                found = [one.memory_info() for one in (process, *process.children(recursive=True))]
                stage.resident = max(stage.resident, sum(info.rss for info in found))
                stage.own = max(stage.own, sum(info.rss - info.shared for info in found))
            stage.disk = max(stage.disk, used(self.work) + used(self.base))


def used(folder: Path) -> int:
    """Bytes on the disk under a folder, a file with two names counted once."""
    inodes: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                about = os.stat(os.path.join(place, name), follow_symlinks=False)
                inodes[about.st_ino] = about.st_blocks * 512
    return sum(inodes.values())


def write_model(folder: Path, shape: str, passages: list[str]) -> None:
    """A checkpoint of random weights in shards, each drawn and written by itself, with a tokenizer of its own size."""
    model_type, sizes = SHAPES[shape]
    config = AutoConfig.for_model(model_type, **sizes, dtype="bfloat16", tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer = load_tokenizer(locate("smollm2-135m"))
    if len(tokenizer) > sizes["vocab_size"]:
        tokenizer = tokenizer.train_new_from_iterator(passages, sizes["vocab_size"], show_progress=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards({name: tensor.shape for name, tensor in model.state_dict().items()})):
        file = f"model-{number:05d}.safetensors"
        save_file({name: drawn(name, shape) for name, shape in shard.items()}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    said = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(said))


def shards(shapes: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    """The tensors by shards of at most ``SHARD`` bytes in bfloat16, in order."""
    shard: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        if shard and 2 * sum(one.numel() for one in (*shard.values(), shape)) > SHARD:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """A tensor of random weights, bfloat16; a norm's are ones."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def commands(options: argparse.Namespace, base: Path, data: Path) -> list[list[str]]:
    """What a user types, up to the cell."""
    samples, length = options.calibration.split("x")
    batch, tokens = options.batch.split("x")
    here = [f"--model={base}", f"--data_dir={data}", f"--device={options.device}", "--dtype=bfloat16"]
    rule = [f"--method={options.method}", f"--importance={options.importance}"]
    if options.importance == "wanda":
        rule.append("--scope=row")
    if options.importance not in ("magnitude", "none"):
        rule += [f"--calibration_samples={samples}", f"--calibration_seq_len={length}"]
    levels = ",".join(str(level) for level in LEVELS)
    masks = f"--masks=masks/masks_sparsity{round(100 * LEVELS[-1])}_{options.method}.safetensors"
    train = ["train", *here, masks, f"--mode={options.mode}", "--lora_r=4", "--lora_alpha=8"]
    train += [f"--max_steps={options.steps}", f"--batch_size={batch}", f"--max_seq_len={tokens}"]
    train += [f"--eval_limit={options.questions}", f"--perplexity_tokens={tokens}", f"--perplexity_seq_len={tokens}"]
    train += ["--output_dir=cell", *(["--register_as=auto"] if options.register else [])]
    return [["compute_masks", *here, *rule, f"--sparsities={levels}", "--output_dir=masks"], train]


def newest(store: str) -> Run:
    """The cell's run: the newest of the store."""
    client = MlflowClient(store)
    return client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1)[0]


def show(options: argparse.Namespace, stages: dict[str, Seen], weights: int, masks: int, run: Run, same: bool) -> None:
    """The table of the stages, and the goals beside what was measured."""
    print(f"\n{options.shape}, {weights / GB:.2f} GB in bfloat16; {options.mode}, {options.method},"
          f" {options.importance}; {options.steps} steps of {options.batch}, {options.questions} questions;"
          f" {options.device}; torch {torch.__version__}, {torch.get_num_threads()} threads\n")  # fmt: skip
    print("| stage | seconds | resident, GB | without files' pages, GB | disk, GB |")
    print("|---|---:|---:|---:|---:|")
    for name, seen in stages.items():
        print(
            f"| {name} | {seen.seconds:.1f} | {seen.resident / GB:.2f} | {seen.own / GB:.2f} | {seen.disk / GB:.2f} |"
        )
    resident = max(seen.resident for seen in stages.values())
    disk = max(seen.disk for seen in stages.values())
    limit, files = weights / GB + SPARE_GB, 2 * weights / GB
    print(f"\nseconds in all: {sum(seen.seconds for seen in stages.values()):.0f}")
    print(f"violations: {run.data.metrics['sparsity/violations']:.0f}; rebuilt as merged: {'yes' if same else 'NO'}")
    print(f"resident at most {resident / GB:.2f} GB, goal {limit:.2f}: {'met' if resident / GB <= limit else 'missed'}")
    masks = 2 * masks / GB  # where they were made, and in the store
    met = "met" if disk / GB <= 1.01 * (files + masks) else "missed"  # the adapter and the store are small beside that
    print(f"disk at most {disk / GB:.2f} GB, goal two copies and the masks {files:.2f} + {masks:.2f}: {met}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--folder", type=Path, required=True, help="keeps the checkpoint; the rest is made anew")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--mode", default="sparse_to_sparse")
    parser.add_argument("--method", default="unstructured")
    parser.add_argument("--importance", default="magnitude")
    parser.add_argument("--calibration", default="8x64", help="samples x tokens, for a rule that looks at activations")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", default="2x64", help="examples x tokens of a training step")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--register", action="store_true", help="log the merged model and register it")
    options = parser.parse_args()
    folder = options.folder.resolve()
    base, work, data = folder / options.shape, folder / "work", options.data_dir.resolve()
    if not (base / "model.safetensors.index.json").is_file():
        with open(data / "boolq" / "train.jsonl", encoding="utf-8") as rows:
            write_model(base, options.shape, [json.loads(row)["passage"] for row in rows])
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    store = f"sqlite:///{work / 'mlflow.db'}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    watched = Watched(work, base)
    for argv in commands(options, base, data):
        watched.run(argv, environment)
    run = newest(store)
    watched.run(["rebuild", f"--run_id={run.info.run_id}", "--output_dir=rebuilt"], environment)
    same = Checkpoint(work / "rebuilt").fingerprint == run.data.tags[Tag.MERGED_FINGERPRINT]
    show(options, watched.stages, weights, used(work / "masks"), run, same)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
