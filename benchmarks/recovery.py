"""How far text, an adapter or all weights, and a dense teacher bring a pruned model back: perplexity on other text.

    python -m benchmarks.recovery --data-dir DIR --folder FOLDER [--rule alps] [--only "lora, 50 %"] [--steps 200]

The model is pruned by the rule, which looks at 64 x 256 tokens of BoolQ train passages, then trained under its mask on
8 x 256 tokens of these passages a step: the product's own recovery. Perplexity: 32 x 256 tokens of dev passages. Rows
are run one after another, or those that --only names; FOLDER keeps the masks (with the weights that the rule updated)
and what was measured, and the table has all rows that were measured there under the same settings. DIR holds
boolq/train.jsonl and boolq/validation.jsonl. Goals: the best row at 50 % at most 1.25 x dense, at 70 % at most 2 x; a
teacher's row better than the same without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import perplexity, tokens
from sparse_ft.cell.clock import Clock
from sparse_ft.cell.masks import make_masks, read_manifest, write_manifest
from sparse_ft.cell.recovery import recover
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.start import Start
from sparse_ft.cell.workbench import Workbench
from sparse_ft.files import write_json
from sparse_ft.memory import peak_bytes, release_memory, reset_peak
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model
from sparse_ft.progress import shown_progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings import modes
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.modes import DENSE, FULL, SPARSE_TO_SPARSE

SAMPLES, LENGTH, BATCH = 32, 256, 8
GOALS = {50: 1.25, 70: 2.0}
SCOPES = {"wanda": "row"}  # of the others: layer
PRUNED = modes.PRUNED.name
# Name -> mode, teacher, and whether it is run unless it is asked for.
ROWS = {
    "lora": (SPARSE_TO_SPARSE, "none", True),
    "lora + teacher": (SPARSE_TO_SPARSE, DENSE.name, True),
    "full": (FULL, "none", False),
    "full + teacher": (FULL, DENSE.name, True),
}


def cell_of(options: argparse.Namespace, row: str, level: int) -> CellConfig:
    """The cell whose recovery a row is."""
    mode, teacher, _ = ROWS.get(row, (modes.PRUNED, "none", True))
    return CellConfig(
        model=options.model,
        task="boolq",
        data_dir=str(options.data_dir),
        dtype=options.dtype,
        importance=options.rule,
        scope=SCOPES.get(options.rule, "layer"),
        sparsity=level / 100,
        calibration_samples=64,
        calibration_seq_len=LENGTH,
        mode=mode.name,
        lora_r=options.rank,
        lora_alpha=2.0 * options.rank,
        recover_steps=0 if row == PRUNED else options.steps,
        recover_seq_len=LENGTH,
        recover_batch_size=BATCH,
        recover_learning_rate=options.full_rate if mode is FULL else options.lora_rate,
        teacher=teacher,
        teacher_ce=options.ce,
        teacher_kl=options.kl,
        teacher_squarehead=options.squarehead,
    )


def masks_of(cell: CellConfig, bench: Workbench, folder: Path) -> MaskFile:
    """The cell's masks, and the weights that they come with; made where they are not there yet."""
    place = folder / f"masks-{cell.importance}-{round(100 * cell.sparsity)}-{cell.dtype}"
    files = read_manifest(place)
    if files is None:
        kind = replace(mask_set_of(cell), sparsities=(cell.sparsity,), figures="none")
        began = time.perf_counter()
        files = make_masks(kind, bench, place)
        write_manifest(place, files)
        print(f"{cell.importance} at {cell.sparsity:.0%}: masks in {time.perf_counter() - began:.0f} s", flush=True)
    return files[0]


def measured(options: argparse.Namespace, row: str, level: int, bench: Workbench, test: torch.Tensor) -> dict[str, Any]:
    """Perplexity, seconds and peak memory of a row, and its settings; of ``pruned`` perplexity alone."""
    cell, folder = cell_of(options, row, level), options.folder
    cell.check()
    file, base = masks_of(cell, bench, folder), bench.checkpoint(cell.model)
    masks, checkpoint = file.load(), base if file.checkpoint is None else Checkpoint(file.checkpoint)
    release_memory()
    model = load_model(checkpoint.folder, cell.dtype, "cpu")
    apply_masks(model, masks)
    found = settings_of(cell) | {"row": row, "level": level, "threads": torch.get_num_threads()}
    if row != PRUNED:
        scratch, clock, result = folder / "scratch", Clock(), CellResult()
        reset_peak()
        teacher = base if cell.has_teacher else None
        recover(cell, bench, model, Start(checkpoint, masks, masks), scratch, clock, result, row, teacher)
        found |= {"seconds": clock.metrics()["time/recover_seconds"], "peak_bytes": peak_bytes()}
        curves = {name: [round(value, 5) for _, value in points] for name, points in result.series.items()}
        found["curves"] = curves
        shutil.rmtree(scratch)
    return found | {"perplexity": perplexity(model, test)}


def settings_of(cell: CellConfig) -> dict[str, Any]:
    """What a measurement is told by, beside its row and level."""
    names = ["model", "importance", "dtype"]
    if cell.recovers:
        names += ["recover_steps", "recover_learning_rate"] + ([] if cell.mode == FULL.name else ["lora_r"])
        names += ["teacher_ce", "teacher_kl", "teacher_squarehead"] if cell.has_teacher else []
    return {name: getattr(cell, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="keeps masks and results")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rule", default="alps", help="wanda, sparsegpt, alps, magnitude, ...")
    parser.add_argument("--levels", default="50,70", help="percent, comma-separated")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=32, help="of the adapters; alpha is twice that")
    parser.add_argument("--lora-rate", type=float, default=1e-3)
    parser.add_argument("--full-rate", type=float, default=1e-4)
    for part in ("ce", "kl", "squarehead"):
        parser.add_argument(f"--{part}", type=float, default=1.0, help="its weight beside a teacher")
    parser.add_argument("--only", default="", help="rows whose name contains this, or one of these with ; between")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    levels = [int(level) for level in options.levels.split(",")]
    bench, results = Workbench(shown_progress()), options.folder / "results.json"
    test = tokens(options.data_dir / "boolq" / "validation.jsonl", bench.tokenizer(options.model), SAMPLES, LENGTH)

    known = json.loads(results.read_text()) if results.is_file() else []
    dense = {"row": "dense", "level": 0, "model": options.model, "dtype": options.dtype}
    if not (before := [one for one in known if dense.items() <= one.items()]):
        model = load_model(bench.checkpoint(options.model).folder, options.dtype, "cpu")
        before = [dense | {"perplexity": perplexity(model, test)}]
        known += before
        del model
    for row, level in [(row, level) for level in levels for row in (PRUNED, *ROWS)]:
        asked = any(part in f"{row}, {level} %" for part in options.only.split(";"))
        if asked and (options.only or row == PRUNED or ROWS[row][2]):
            found = measured(options, row, level, bench, test)
            same = settings_of(cell_of(options, row, level)) | {"row": row, "level": level}
            known = [one for one in known if not same.items() <= one.items()] + [found]
            write_json(results, known)
            print(f"{row}, {level} %: perplexity {found['perplexity']:.2f}", flush=True)
    show(options, levels, known, before[0]["perplexity"])


def show(options: argparse.Namespace, levels: list[int], known: list[dict[str, Any]], dense: float) -> None:
    """The table of what was measured under these settings, and the goals beside it."""
    print(f"\n{options.model}, {options.rule}, {options.dtype}, {options.steps} steps of {BATCH} x {LENGTH} tokens;"
          f" torch {torch.__version__}, {torch.get_num_threads()} threads; dense {dense:.2f}\n")  # fmt: skip
    print("| sparsity | recovery | learning rate | perplexity | / dense | goal | minutes | peak GB |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for level in levels:
        ratios: dict[str, float] = {}
        for row in (PRUNED, *ROWS):
            same = settings_of(cell_of(options, row, level)) | {"row": row, "level": level}
            for one in (one for one in known if same.items() <= one.items()):
                ratios[row] = one["perplexity"] / dense
                cost = ["", "", ""]
                if row != PRUNED:
                    cost = [f"{one['recover_learning_rate']:g}", f"{one['seconds'] / 60:.1f}"]
                    cost.append(f"{one['peak_bytes'] / 1e9:.1f}")
                goal = f"<= {GOALS[level]:g}" if level in GOALS and row != PRUNED else ""
                print(f"| {level} % | {row} | {cost[0]} | {one['perplexity']:.2f} | {ratios[row]:.2f} | {goal} "
                      f"| {cost[1]} | {cost[2]} |")  # fmt: skip
        best = min((ratio for row, ratio in ratios.items() if row != PRUNED), default=None)
        if best is not None and level in GOALS:
            met = "met" if best <= GOALS[level] else "missed"
            print(f"| {level} % | **best** | | | **{best:.2f}** | <= {GOALS[level]:g}: {met} | | |")
        for row in ("lora", "full"):
            if {row, f"{row} + teacher"} <= ratios.keys():
                met = "met" if ratios[f"{row} + teacher"] < ratios[row] else "missed"
                print(f"| {level} % | {row}: teacher better than none | | | | {met} | | |")


if __name__ == "__main__":
    main()
