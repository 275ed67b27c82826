"""Sparse LoRA against plain PEFT LoRA and a naive masked LoRA: step time and peak memory, side by side.

    python benchmarks/sparse_lora.py                      one linear map, d = T = 2048, r = 16, fp32 and bf16
    python benchmarks/sparse_lora.py --model FOLDER       also whole training steps of a checkpoint
    python benchmarks/sparse_lora.py --model FOLDER --dtypes mixed    on a CPU without bfloat16 instructions
    python benchmarks/sparse_lora.py --llama-7b           also of a LLaMA-7B shape with random weights (a GPU)

The variants take turns in one process, so that whatever else the machine does hits them alike; ratios are
taken within a round, figures are medians over the rounds. "Ours" rounds with dither, as it does by default; what that
takes is printed below each table as a ratio to rounding to the nearest, with its limit beside it. It makes the
effective weights again in backward (`keep_effective: never`), or keeps them (always); on a GPU its kernels make them,
and in a row of its own plain torch. Beside a ratio stands its goal. Needs torch, transformers, peft, safetensors and
sparse_ft, nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ft.lora import LoraSettings, SparseLoRAConfig, SparseLoRALayer, apply_sparse_lora, function
from sparse_ft.lora.keeping import set_keeping
from sparse_ft.lora.kernels import kernels_of, made_by
from sparse_ft.masks.mask_set import MaskSet, pack_bits
from sparse_ft.models.names import role
from sparse_ft.settings.lora import ALWAYS, NEVER
from sparse_ft.settings.modes import DENSE, SPARSE_TO_SPARSE

SPARSITY = 0.5
SCALING = 2.0  # alpha / r
DITHER_LIMIT = 1.10  # of a whole training step on a CPU
OURS = "ours, unstructured"
KEPT = "ours, unstructured, kept"
NEAREST = "ours, unstructured, to the nearest"
BY_TORCH = "ours, unstructured, by torch"
NAIVE = "naive, unstructured"
# (device, dtype) -> most of plain LoRA's time: of a map, of a step with the best of making again and keeping.
GOALS = {("cuda", "bfloat16"): (0.80, 1.00), ("cpu", "float32"): (None, 1.25)}
STRUCTURED_GOAL = 1.00


class NaiveLayer(nn.Module):
    """What one writes first: the masked product is a tensor of the weight's size, kept for backward."""

    def __init__(self, base: nn.Linear, rank: int, mask: Tensor) -> None:
        super().__init__()
        self.base, self.mask = base, mask.to(base.weight.dtype)
        options = {"device": base.weight.device, "dtype": torch.float32}
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **options) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, **options))

    def forward(self, x: Tensor) -> Tensor:
        delta = (SCALING * self.b.to(x.dtype) @ self.a.to(x.dtype)) * self.mask
        return F.linear(x, self.base.weight + delta, self.base.bias)


def random_mask(rows: int, columns: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "unstructured":
        return torch.rand(rows, columns, generator=generator) >= SPARSITY
    return (torch.rand(rows, 1, generator=generator) >= SPARSITY).expand(rows, columns).contiguous()


def alternate(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, dict]:
    """Median seconds of each step, taking turns; then the peak of memory that one step adds.

    ``ratio`` is the median over the rounds of a step's time to plain LoRA's in the same round.
    """
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            began = clock()
            step()
            synchronize(device)
            seconds[name].append(clock() - began)
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(t / p for t, p in zip(times, seconds["plain LoRA"], strict=True)),
            "to_nearest": statistics.median(t / n for t, n in zip(times, seconds[NEAREST], strict=True)),
            "rounds": times,
            "peak_bytes": peak_bytes(steps[name], device),
        }
        for name, times in seconds.items()
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive during one step, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    alive = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float]) -> float:
    """FLOP/s of this device's own square matrix product, the best of a few."""
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        began = clock()
        x @ y
        synchronize(device)
        best = min(best, clock() - began)
    return 2 * size**3 / best


def linear_steps(d: int, tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """One forward and backward of a d x d map in the middle of a network (its input wants a gradient)."""
    torch.manual_seed(0)
    x = torch.randn(tokens, d, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(tokens, d, device=device).to(dtype)
    common = {"r": rank, "lora_alpha": SCALING * rank}

    def base(mask: Tensor | None = None) -> nn.Linear:
        layer = nn.Linear(d, d, bias=False, device=device, dtype=dtype).requires_grad_(False)
        if mask is not None:
            layer.weight.data *= mask.to(device)
        return layer

    def sparse(kind: str, rounding: str = "dithered", keep: str = NEVER) -> nn.Module:
        mask = random_mask(d, d, kind, 1)
        layer = SparseLoRALayer(base(mask), "default", config=SparseLoRAConfig(**common, rounding=rounding), **common)
        layer.attach_mask(pack_bits(mask), kind)
        set_keeping(layer, keep)
        return layer

    layers = {
        "plain LoRA": PeftLinear(base(), "default", config=LoraConfig(**common), **common),
        OURS: sparse("unstructured"),
        KEPT: sparse("unstructured", keep=ALWAYS),
        NEAREST: sparse("unstructured", "nearest"),
        "ours, structured": sparse("structured"),
        NAIVE: NaiveLayer(base(), rank, random_mask(d, d, "unstructured", 1).to(device)),
    }
    for layer in layers.values():
        layer.to(device).train()
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()  # as PEFT keeps adapters of a bf16 model

    def step(layer: nn.Module) -> None:
        layer(x).backward(gradient)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return also_by_torch({name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}, device)


def also_by_torch(steps: dict[str, Callable], device: torch.device) -> dict[str, Callable]:
    """The steps, and where kernels do the work a step in which plain torch does it."""
    if kernels_of(device.type) is None:
        return steps

    def by_torch() -> None:
        with mock.patch.object(function, "kernels_of", lambda kind: None):
            steps[OURS]()

    return {**steps, BY_TORCH: by_torch}


def model_steps(
    make: Callable[[], nn.Module], rank: int, rows: int, length: int, checkpointing: bool, device: torch.device
) -> dict[str, Callable]:
    """Whole training steps: loss on the last 8 positions, AdamW on the adapters."""

    def masks(model: nn.Module, kind: str) -> MaskSet:
        from sparse_ft.models.loading import prunable_shapes

        packed, generator = {}, torch.Generator().manual_seed(1)
        for seed, (name, shape) in enumerate(prunable_shapes(model).items()):
            if kind == "unstructured" and shape[1] % 8 == 0:  # random bits as they are: half of them
                packed[name] = torch.randint(0, 256, (shape[0], shape[1] // 8), dtype=torch.uint8, generator=generator)
                continue
            by_column = kind == "structured" and role(model.config.to_dict(), name).map.axis == "column"
            mask = random_mask(*(shape[::-1] if by_column else shape), kind, seed)
            packed[name] = pack_bits(mask.t().contiguous() if by_column else mask)
        return MaskSet(packed, prunable_shapes(model))

    def prepared(kind: str) -> nn.Module:
        rounding, keep = "nearest" if kind == NEAREST else "dithered", ALWAYS if kind == KEPT else NEVER
        model, settings = (
            make(),
            LoraSettings(lora_r=rank, lora_alpha=SCALING * rank, rounding=rounding, keep_effective=keep),
        )
        if kind == "plain LoRA":
            model = apply_sparse_lora(model, settings, DENSE.name)
        elif kind == NAIVE:
            model = with_naive_layers(model, rank, masks(model, "unstructured"))
        else:
            model = apply_sparse_lora(model, settings, SPARSE_TO_SPARSE.name, masks(model, kind.split(", ")[1]))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    steps = {}
    for kind in ("plain LoRA", OURS, KEPT, NEAREST, "ours, structured", NAIVE):
        model = prepared(kind)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(3, model.config.vocab_size, (rows, length), device=device)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer, ids: Tensor = ids) -> None:
            logits = model(input_ids=ids, logits_to_keep=9, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.float().flatten(0, 1), ids[:, -8:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[kind] = step
    return also_by_torch(steps, device)


def with_naive_layers(model: nn.Module, rank: int, masks: MaskSet) -> nn.Module:
    model.requires_grad_(False)
    for name in masks:
        path = name.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        layer = model.get_submodule(path)
        mask = masks[name].to(layer.weight.device)
        layer.weight.data *= mask
        setattr(model.get_submodule(parent), child, NaiveLayer(layer, rank, mask))
    return model


def load(folder: str, dtype: torch.dtype, device: torch.device, mixed: bool) -> Callable[[], nn.Module]:
    """``mixed``: only the adapted weights have the dtype, and all that is computed is float32."""
    from sparse_ft.models.loading import load_model, prunable_shapes

    def make() -> nn.Module:
        model = load_model(folder, torch.float32 if mixed else dtype, device)
        for name in prunable_shapes(model) if mixed else ():
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.weight.data = layer.weight.data.to(dtype)
            layer.forward = lambda x, layer=layer: F.linear(x, layer.weight.float(), layer.bias)
        return model

    return make


def llama_7b(layers: int, device: torch.device) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shared: list[nn.Module] = []

    def make() -> nn.Module:
        # One set of base weights for all variants: only their adapters and masks differ in size.
        config = LlamaConfig(num_hidden_layers=layers, use_cache=False)
        if not shared:
            with device:
                shared.append(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(shared[0].state_dict(), assign=True)
        model.model.rotary_emb = shared[0].model.rotary_emb
        return model

    return make


def table(
    title: str, results: dict[str, dict], flops: dict[str, float], rate: float, limit: float | None, goal: float | None
) -> None:
    """Prints one table; ``limit``: of dithered rounding's ratio, ``goal``: of ours to plain LoRA, or None."""
    plain = results["plain LoRA"]
    goals = {OURS: goal, KEPT: goal, "ours, structured": None if goal is None else STRUCTURED_GOAL}
    print(f"\n{title}")
    print("| variant | ms a step | x plain | goal | peak MB | x plain | TFLOP/s | of matmul |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in results.items():
        cells = [
            name,
            f"{1e3 * row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            "" if goals.get(name) is None else f"{goals[name]:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / plain['peak_bytes']:.2f}",
        ]
        speed = flops[name] / row["seconds"]
        row["flops_per_second"] = speed
        cells += [f"{speed / 1e12:.3f}", f"{speed / rate:.2f}"]
        print("| " + " | ".join(cells) + " |")
    ratio = f"dithered / nearest, unstructured: {results[OURS]['to_nearest']:.3f}"
    print(ratio + (f" (limit {limit:.2f})" if limit else ""))


def gemm_flops(weights: float, tokens: int, recompute: bool) -> dict[str, float]:
    """Floating point operations of the big products alone: forward, dX, and dW where a variant needs it."""
    three = dict.fromkeys((OURS, KEPT, NEAREST, BY_TORCH, NAIVE), 3)
    passes = {"plain LoRA": 2, "ours, structured": 2, **three}
    return {name: 2.0 * (count + recompute) * tokens * weights for name, count in passes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtypes",
        default="float32,bfloat16",
        help="mixed: bfloat16 weights and float32 activations, for whole steps on a CPU without bfloat16 instructions",
    )
    parser.add_argument("--d", type=int, default=2048, help="size of the single map; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", help="folder of a checkpoint, for whole steps")
    parser.add_argument("--rows", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=160, help="tokens a sequence")
    parser.add_argument("--llama-7b", action="store_true")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the LLaMA-7B shape")
    parser.add_argument("--checkpointing", action="store_true", help="of every block, in whole steps")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor seconds instead of the clock's, for a machine that is busy otherwise; with --threads 1",
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, sparsity {SPARSITY}, r = {args.rank}")
    print(f"effective weights made by {made_by(device)}")
    figures: dict[str, dict] = {}
    for dtype_name in args.dtypes.split(","):
        mixed = dtype_name == "mixed"
        dtype = torch.bfloat16 if mixed else getattr(torch, dtype_name)
        rate = matmul_rate(device, torch.float32 if mixed else dtype, 8192 if device.type == "cuda" else 2048, clock)
        map_goal, step_goal = GOALS.get((device.type, dtype_name), (None, None))
        print(f"\n{dtype_name}: matrix product {rate / 1e12:.3f} TFLOP/s")
        if args.d and not mixed:
            steps = linear_steps(args.d, args.tokens, args.rank, dtype, device)
            results = alternate(steps, args.rounds, device, clock)
            title = f"one linear map, {dtype_name}, d = {args.d}, T = {args.tokens}"
            table(title, results, gemm_flops(args.d**2, args.tokens, False), rate, None, map_goal)
            figures[title] = results
        makers = {}
        if args.model:
            makers[Path(args.model).name] = load(args.model, dtype, device, mixed)
        if args.llama_7b and dtype == torch.bfloat16:
            makers[f"LLaMA-7B shape, {args.layers} blocks"] = llama_7b(args.layers, device)
        for label, make in makers.items():
            steps = model_steps(make, args.rank, args.rows, args.length, args.checkpointing, device)
            results = alternate(steps, args.rounds, device, clock)
            weights = block_weights(make())
            title = f"{label}, {dtype_name}, {args.rows} x {args.length} tokens, checkpointing {args.checkpointing}"
            flops = gemm_flops(weights, args.rows * args.length, args.checkpointing)
            step_goal = None if args.checkpointing else step_goal
            table(title, results, flops, rate, DITHER_LIMIT if device.type == "cpu" else None, step_goal)
            figures[title] = results
            del steps
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def block_weights(model: nn.Module) -> int:
    """Weights of the decoder blocks' linear maps: what a token is multiplied with."""
    return sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n)


if __name__ == "__main__":
    main()
