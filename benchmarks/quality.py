"""How much perplexity each pruning method costs a real model, beside the papers' own reference code.

    python -m benchmarks.quality --data-dir DIR [--wanda CLONE --sparsegpt CLONE] [--model smollm2-135m] [--samples 64]
        [--only wanda]

Calibration: 64 x 256 tokens of BoolQ train passages; perplexity: 64 x 256 tokens of other, dev passages;
fp32; block-sequential. DIR holds boolq/train.jsonl and boolq/validation.jsonl with a column ``passage``.
With clones of github.com/locuslab/wanda and github.com/IST-DASLab/sparsegpt their code prunes the same weights
with the same text, and the last column but one says how far ours is behind (goal: at most 1.03).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.papers import prune_as_published
from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model, load_state_into, load_tokenizer
from sparse_ft.progress import shown_progress
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings

SAMPLES, LENGTH = 64, 256

WANDA = {"importance": "wanda", "scope": "row"}
SPARSEGPT, ALPS = {"importance": "sparsegpt"}, {"importance": "alps"}
REFIT, SWAPS, BLOCK = {"update": "refit"}, {"refine": "swaps"}, {"reconstruct": "block"}
LEVELS = {f"{level} %": {"sparsities": (level / 100,)} for level in (30, 50, 60, 70, 80)}
LEVELS["2:4"] = {"method": "semi_structured", "sparsities": (0.5,), "scope": "layer"}
MANY = ("50 %", "60 %", "70 %", "80 %", "2:4")
NEWER = {
    "wanda, row, + swaps": WANDA | SWAPS,
    "wanda, row, + refit": WANDA | REFIT,
    "wanda, row, + swaps + refit": WANDA | SWAPS | REFIT,
    "sparsegpt + refit": SPARSEGPT | REFIT,
    "sparsegpt + block": SPARSEGPT | BLOCK,
    "alps": ALPS,
    "alps + block": ALPS | BLOCK,
}
SHARED_OUT = {"wanda, row, + {}": WANDA, "alps + {}": ALPS, "alps + {} + block": ALPS | BLOCK}


def row(name: str, what: str, how: dict, published: tuple | None = None) -> tuple[str, dict, tuple | None]:
    """Name, settings, and the (importance, sparsity, N:M) that the papers' code is asked for."""
    return f"{name}, {what}", how | LEVELS[what], published


ROWS = [
    row("magnitude, layer", "50 %", {"importance": "magnitude"}, ("magnitude", 0.5, None)),
    row("wanda, row", "50 %", WANDA, ("wanda", 0.5, None)),
    row("wanda, row", "60 %", WANDA),
    row("wanda, row", "70 %", WANDA, ("wanda", 0.7, None)),
    row("wanda, row", "80 %", WANDA),
    row("wanda", "2:4", WANDA, ("wanda", 0.5, (2, 4))),
    row("sparsegpt", "50 %", SPARSEGPT, ("sparsegpt", 0.5, None)),
    row("sparsegpt", "60 %", SPARSEGPT),
    row("sparsegpt", "70 %", SPARSEGPT, ("sparsegpt", 0.7, None)),
    row("sparsegpt", "80 %", SPARSEGPT),
    row("sparsegpt", "2:4", SPARSEGPT, ("sparsegpt", 0.5, (2, 4))),
    *(row(name, what, how) for what in MANY for name, how in NEWER.items()),
    *(
        row(name.format(allocation), what, how | {"allocation": allocation})
        for what in ("50 %", "70 %", "80 %")
        for name, how in SHARED_OUT.items()
        for allocation in ("owl", "dlp")
    ),
    row("gradient, layer", "50 %", {"importance": "gradient"}),
    row("taylor, layer", "50 %", {"importance": "taylor"}),
    row("random, layer", "50 %", {"method": "random"}),
    row("structured magnitude", "30 %", {"method": "structured"}),
    row("structured taylor", "30 %", {"method": "structured", "importance": "taylor"}),
]


def tokens(file: Path, tokenizer, samples: int = SAMPLES, length: int = LENGTH) -> torch.Tensor:
    """The first ``samples * length`` tokens of a file's distinct passages, int64 [samples, length]."""
    ids: list[int] = []
    seen: set[str] = set()
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            passage = json.loads(line)["passage"]
            if passage not in seen:
                seen.add(passage)
                ids += tokenizer(passage + "\n\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= samples * length:
                break
    return torch.tensor(ids[: samples * length], dtype=torch.int64).view(samples, length)


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    """exp of the mean next-token loss; every sample is read by itself."""
    total = 0.0
    for batch in ids.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--wanda", type=Path, help="a clone of github.com/locuslab/wanda")
    parser.add_argument("--sparsegpt", type=Path, help="a clone of github.com/IST-DASLab/sparsegpt")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of calibration and of test")
    parser.add_argument("--only", default="", help="rows whose name contains this, or one of these with ; between")
    options = parser.parse_args()
    folder = locate(options.model)
    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    samples = options.samples
    train = tokens(options.data_dir / "boolq" / "train.jsonl", tokenizer, samples)
    test = tokens(options.data_dir / "boolq" / "validation.jsonl", tokenizer, samples)
    calibration = Calibration(train, {"task": "boolq", "split": "train", "samples": samples, "length": LENGTH})
    model = load_model(folder, "float32", "cpu")
    print(f"{options.model}, fp32, calibration and test {samples} x {LENGTH} tokens; torch {torch.__version__}\n")
    print("| method | sparsity | perplexity | / dense | papers' code | ours / papers' | minutes, ours | papers' |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    dense = perplexity(model, test)
    print(f"| dense | 0 | {dense:.2f} | 1.00 | | | | |", flush=True)
    for name, how, published in ROWS:
        if not any(part in name for part in options.only.split(";")):
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            settings = PruningSettings(dtype="float32", **how)
            generator = MaskGenerator(folder, settings, calibration, progress=shown_progress())
            result = generator.generate(scratch, figures="none")[0]
            minutes = (time.perf_counter() - begin) / 60
            load_state_into(model, Checkpoint(result.checkpoint) if result.checkpoint else checkpoint)
            apply_masks(model, result.load())
        ours = perplexity(model, test)
        row = f"| {name} | {result.achieved:.4f} | {ours:.2f} | {ours / dense:.2f} "
        if published is None or options.wanda is None or options.sparsegpt is None:
            print(f"{row}| | | {minutes:.1f} | |", flush=True)
            continue
        begin = time.perf_counter()
        load_state_into(model, checkpoint)
        with contextlib.redirect_stdout(io.StringIO()):
            prune_as_published(model, train, *published, options.wanda, options.sparsegpt)
        theirs_minutes = (time.perf_counter() - begin) / 60
        theirs = perplexity(model, test)
        print(f"{row}| {theirs:.2f} | {ours / theirs:.4f} | {minutes:.1f} | {theirs_minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
