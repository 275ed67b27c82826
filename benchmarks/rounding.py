"""What rounding costs a sparse LoRA in bfloat16: loss on held-out questions, and the weights that moved.

    python benchmarks/rounding.py            SmolLM2-135M, 50 % unstructured, BoolQ; a quarter of an hour or so
    python benchmarks/rounding.py --model tiny-llama --data_dir made --steps 2,4    a look at how it works

Three trainings in mode sparse_to_sparse, alike but for the dtype of the adapted weights and its rounding; each is
scored after some of its steps, merged. The float32 one is also merged into bfloat16 in both ways. Activations are
float32 throughout, so that the machine needs no bfloat16 instructions and nothing but the weights' rounding differs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TrainerCallback

from sparse_ft.evaluation import EvaluationSettings, answer_loss
from sparse_ft.lora import LoraSettings, apply_sparse_lora
from sparse_ft.lora.merge import adapted_layers
from sparse_ft.lora.rounding import dither, noise_key
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import training_examples
from sparse_ft.tasks.made import MADE, made_data_dir
from sparse_ft.training import TrainingSettings, train

Weights = dict[str, Tensor]


class AtSteps(TrainerCallback):
    """Hands the merged weights over after some of the steps."""

    def __init__(self, steps: list[int], take: Callable[[int, Weights], None]) -> None:
        self._steps, self._take = steps, take

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self._steps:
            merged = {name: layer.effective_weight("default") for name, layer in adapted_layers(model)}
            self._take(state.global_step, merged)


def magnitude_masks(checkpoint: Checkpoint, sparsity: float) -> MaskSet:
    masks = {}
    for name in checkpoint.prunable:
        size = checkpoint.tensor(name).float().abs()
        order = size.flatten().argsort(stable=True)
        mask = torch.ones(size.numel(), dtype=torch.bool)
        mask[order[: round(sparsity * size.numel())]] = False
        masks[name] = mask.view(size.shape)
    return MaskSet.from_bool(masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data_dir", default="packaged")
    parser.add_argument("--steps", default="12,48", help="after which the model is scored; the last ends it")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--max_seq_len", type=int, default=160)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()
    steps = [int(step) for step in args.steps.split(",")]
    folder = locate(args.model)
    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    task = load_task("boolq", made_data_dir() if args.data_dir == MADE else args.data_dir)
    masks = magnitude_masks(checkpoint, 0.5)
    settings = TrainingSettings(learning_rate=args.learning_rate, max_steps=steps[-1], batch_size=2)
    examples = training_examples(task, tokenizer, args.max_seq_len, settings.examples_needed, 0)
    scored = load_model(folder, torch.float32, "cpu")
    rows: dict[str, dict[int, tuple[float, float]]] = {}

    def score(row: str, step: int, merged: Weights) -> None:
        """``merged``: in the dtype it is to be kept in."""
        moved = 0
        for name, weight in merged.items():
            scored.get_parameter(name).data.copy_(weight)
            moved += int(((weight != checkpoint.tensor(name).to(weight.dtype)) & masks[name]).sum())
        loss = answer_loss(scored, tokenizer, task, EvaluationSettings(limit=args.questions))["loss"]
        share = moved / sum(int(masks[name].sum()) for name in merged)
        rows.setdefault(row, {})[step] = (loss, share)
        print(f"{row}, {step} steps: loss {loss:.3f}, {100 * share:.2f} % of the kept weights moved", flush=True)

    def take_float32(step: int, merged: Weights) -> None:
        score("float32", step, merged)
        score("float32, merged to bfloat16 by the nearest", step, {n: w.bfloat16() for n, w in merged.items()})
        for seed in range(3):
            dithered = {n: dither(w, torch.bfloat16, noise_key(n, seed)) for n, w in merged.items()}
            score(f"float32, merged to bfloat16 with dither, seed {seed}", step, dithered)

    def run(dtype: torch.dtype, rounding: str, take: Callable[[int, Weights], None]) -> None:
        model = load_model(folder, torch.float32, "cpu")
        for name in checkpoint.prunable:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        torch.manual_seed(0)
        model = apply_sparse_lora(model, LoraSettings(r=16, alpha=32, rounding=rounding), "sparse_to_sparse", masks)
        with tempfile.TemporaryDirectory() as scratch:
            train(model, examples, settings, scratch, tokenizer.pad_token_id, callbacks=[AtSteps(steps, take)])

    run(torch.float32, "nearest", take_float32)
    for rounding in ("nearest", "dithered"):
        row = f"bfloat16, {rounding}"
        run(torch.bfloat16, rounding, lambda step, merged, row=row: score(row, step, merged))

    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = [f"loss, {step} steps | kept weights moved" for step in steps]
    print("| sparse_to_sparse | " + " | ".join(heads) + " |\n|---|" + "---:|---:|" * len(steps))
    for row, found in rows.items():
        print(f"| {row} | " + " | ".join(f"{loss:.2f} | {100 * share:.1f} %" for loss, share in found.values()) + " |")


if __name__ == "__main__":
    main()
