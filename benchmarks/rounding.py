"""What rounding costs a sparse LoRA in bfloat16: loss on held-out questions, and the weights that moved.

    python benchmarks/rounding.py            SmolLM2-135M, 50 % unstructured, BoolQ; a quarter of an hour or so
    python benchmarks/rounding.py --mode full --learning_rate 1e-5      full fine-tuning: write-back or master weights
    python benchmarks/rounding.py --model tiny-llama --data_dir made --steps 2,4    a look at how it works

For each number of steps three trainings in mode sparse_to_sparse, alike but for the dtype of the adapted weights and
its rounding; each is scored merged. The float32 one is also merged into bfloat16 in both ways. Activations are float32
throughout, so that the machine needs no bfloat16 instructions and nothing but the weights' rounding differs. In mode
full, "master weights" are float32 weights of which each forward pass sees the bfloat16 ones, and so does the merge.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ft.evaluation import ScoringSettings, answer_loss
from sparse_ft.lora import LoraSettings, apply_sparse_lora
from sparse_ft.lora.merge import adapted_layers
from sparse_ft.lora.rounding import dither, noise_key
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.settings.modes import FULL, SPARSE_TO_SPARSE
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import training_examples
from sparse_ft.tasks.made import MADE, made_data_dir
from sparse_ft.training import train

Weights = dict[str, Tensor]


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
    parser.add_argument("--mode", default=SPARSE_TO_SPARSE.name, choices=(SPARSE_TO_SPARSE.name, FULL.name))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data_dir", default="packaged")
    parser.add_argument("--steps", default="12,48", help="one set of trainings for each")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--max_seq_len", type=int, default=160)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()
    steps = [int(step) for step in args.steps.split(",")]
    folder = locate(args.model)
    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    task = load_task("boolq", made_data_dir() if args.data_dir == MADE else args.data_dir)
    masks = magnitude_masks(checkpoint, 0.5)
    scored = load_model(folder, torch.float32, "cpu")
    rows: dict[str, dict[int, tuple[float, float]]] = {}

    def score(row: str, step: int, merged: Weights) -> None:
        """``merged``: in the dtype it is to be kept in."""
        moved = 0
        for name, weight in merged.items():
            scored.get_parameter(name).data.copy_(weight)
            moved += int(((weight != checkpoint.tensor(name).to(weight.dtype)) & masks[name]).sum())
        loss = answer_loss(scored, tokenizer, task, ScoringSettings(eval_limit=args.questions))["loss"]
        share = moved / sum(int(masks[name].sum()) for name in merged)
        rows.setdefault(row, {})[step] = (loss, share)
        print(f"{row}, {step} steps: loss {loss:.3f}, {100 * share:.2f} % of the kept weights moved", flush=True)

    def base(dtype: torch.dtype) -> nn.Module:
        model = load_model(folder, torch.float32, "cpu")
        for name in checkpoint.prunable:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        return model

    def fitted(model: nn.Module, count: int, rounding: str) -> nn.Module:
        """The model after ``count`` steps."""
        lr = args.learning_rate
        settings = TrainingSettings(learning_rate=lr, max_steps=count, batch_size=2, rounding=rounding)
        examples = training_examples(task, tokenizer, args.max_seq_len, settings.examples_needed, 0)
        with tempfile.TemporaryDirectory() as scratch:
            train(model, examples, settings, scratch, tokenizer.pad_token_id)
        return model

    def sparse_to_sparse(dtype: torch.dtype, rounding: str, count: int) -> Weights:
        torch.manual_seed(0)
        lora = LoraSettings(lora_r=16, lora_alpha=32, rounding=rounding)
        model = fitted(apply_sparse_lora(base(dtype), lora, SPARSE_TO_SPARSE.name, masks), count, rounding)
        return {name: layer.effective_weight("default") for name, layer in adapted_layers(model)}

    def full(dtype: torch.dtype, seen: torch.dtype, rounding: str, count: int) -> Weights:
        """``seen``: the dtype in which a forward pass sees the weights."""
        model = apply_sparse_lora(base(dtype), LoraSettings(), FULL.name, masks)
        for name in checkpoint.prunable:
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.forward = lambda x, layer=layer: F.linear(x, layer.weight.to(seen).float(), layer.bias)
        model = fitted(model, count, rounding)
        return {name: model.get_parameter(name).detach() for name in checkpoint.prunable}

    for count in steps:
        if args.mode == FULL.name:
            f32, bf16 = torch.float32, torch.bfloat16
            score("float32", count, full(f32, f32, "nearest", count))
            merged = {n: w.bfloat16() for n, w in full(f32, bf16, "nearest", count).items()}
            score("bfloat16 with float32 master weights", count, merged)
            score("bfloat16, written back to the nearest", count, full(bf16, bf16, "nearest", count))
            score("bfloat16, written back with dither", count, full(bf16, bf16, "dithered", count))
            continue
        merged = sparse_to_sparse(torch.float32, "nearest", count)
        score("float32", count, merged)
        score("float32, merged to bfloat16 by the nearest", count, {n: w.bfloat16() for n, w in merged.items()})
        for seed in range(3):
            dithered = {n: dither(w, torch.bfloat16, noise_key(n, seed)) for n, w in merged.items()}
            score(f"float32, merged to bfloat16 with dither, seed {seed}", count, dithered)
        for rounding in ("nearest", "dithered"):
            score(f"bfloat16, {rounding}", count, sparse_to_sparse(torch.bfloat16, rounding, count))

    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = [f"loss, {step} steps | kept weights moved" for step in steps]
    print(f"| {args.mode} | " + " | ".join(heads) + " |\n|---|" + "---:|---:|" * len(steps))
    for row, found in rows.items():
        print(f"| {row} | " + " | ".join(f"{loss:.2f} | {100 * share:.1f} %" for loss, share in found.values()) + " |")


if __name__ == "__main__":
    main()
