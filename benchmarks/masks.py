"""Ten levels of global magnitude masks of a large checkpoint, beside what else could make them.

    python -m benchmarks.masks [--scale 1b] [--folder DIR] [--threads N] [--repeat 3]

Writes a LLaMA-shaped checkpoint of random bfloat16 weights in shards (kept in DIR for the next time), then
measures in this one process: our ten levels; torch.kthvalue at one level; prune.global_unstructured at one level;
and the limit, which reads the file twice, writes as many bytes as the masks have, and does nothing else; once as
one writes it first, once telling the kernel to flush early, as our writer does. What does not fit into memory is
said and left out, never estimated. Medians; by turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from sparse_ft.files import write_json
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning import MaskGenerator, PruningSettings

LEVELS = tuple(round(0.1 * step, 1) for step in range(10))
# hidden, intermediate, layers, heads, key/value heads
SCALES = {
    "20m": (512, 1376, 8, 8, 4),
    "250m": (1024, 2816, 22, 16, 4),
    "1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
}
VOCABULARY = 32000
CHUNK = 8 << 20


def write_checkpoint(folder: Path, scale: str, shard_bytes: int = 1 << 29) -> None:
    """A LLaMA of random bfloat16 weights, in shards of about ``shard_bytes``."""
    hidden, inner, layers, heads, groups = SCALES[scale]
    head = hidden // heads
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for block in range(layers):
        prefix = f"model.layers.{block}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (heads * head, hidden),
            f"{prefix}.self_attn.k_proj.weight": (groups * head, hidden),
            f"{prefix}.self_attn.v_proj.weight": (groups * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        if shard and sum(2 * tensor.numel() for tensor in shard.values()) + 2 * math.prod(shape) > shard_bytes:
            flush()
        shard[name] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": VOCABULARY,
    }
    write_json(folder / "config.json", config)  # last: a folder with a config is whole


class Cost(NamedTuple):
    seconds: float
    processor_seconds: float  # over all threads: what is left of it on a busy machine
    peak: float  # of resident memory above what was resident before, in bytes


def measured(work: Callable[[], None]) -> Cost:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = psutil.Process().memory_info().rss
    begin, used = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return Cost(seconds, used, max(0, peak - before))


def ours(checkpoint: Checkpoint, scratch: Path, threads: int) -> None:
    settings = PruningSettings(scope="global", sparsities=LEVELS, threads=threads)
    MaskGenerator(checkpoint.folder, settings).generate(scratch, figures="none")


def limit(checkpoint: Checkpoint, scratch: Path, threads: int, flush_early: bool = False) -> None:
    """Two readings of the prunable bytes, then files as large as the masks, synced to disk as ours are."""

    def read(name: str) -> None:
        buffer = bytearray(min(CHUNK, checkpoint.nbytes(name)))
        with open(checkpoint.shard(name), "rb", buffering=0) as file:
            file.seek(checkpoint.offset(name))
            left = checkpoint.nbytes(name)
            while left:
                left -= file.readinto(memoryview(buffer)[: min(left, len(buffer))])

    packed = sum(math.prod(shape[:-1]) * ((shape[-1] + 7) // 8) for shape in checkpoint.prunable_shapes().values())

    def write(level: int) -> None:
        content = np.zeros(CHUNK, np.uint8)
        with open(scratch / f"limit_{level}.bin", "wb", buffering=0) as file:
            for begin in range(0, packed, CHUNK):
                file.write(content[: min(CHUNK, packed - begin)])
                if flush_early and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            list(pool.map(read, checkpoint.prunable))
        list(pool.map(write, range(len(LEVELS))))


def magnitudes(checkpoint: Checkpoint) -> torch.Tensor:
    total = sum(math.prod(shape) for shape in checkpoint.prunable_shapes().values())
    values, begin = torch.empty(total, dtype=torch.bfloat16), 0
    for name in checkpoint.prunable:
        tensor = checkpoint.tensor(name).flatten()
        torch.abs(tensor, out=values[begin : begin + tensor.numel()])
        begin += tensor.numel()
    return values


def kthvalue(checkpoint: Checkpoint) -> None:
    """One level: the threshold, and the masks in memory, as booleans."""
    values = magnitudes(checkpoint)
    threshold = values.kthvalue(round(0.5 * values.numel())).values
    _ = values > threshold


def torch_prune(checkpoint: Checkpoint) -> None:
    """One level with torch's own pruning of modules."""
    from torch.nn.utils import prune

    modules = []
    for name in checkpoint.prunable:
        rows, columns = checkpoint.shape(name)
        module = torch.nn.Linear(columns, rows, bias=False, device="meta")
        module.weight = torch.nn.Parameter(checkpoint.tensor(name), requires_grad=False)
        modules.append((module, "weight"))
    prune.global_unstructured(modules, pruning_method=prune.L1Unstructured, amount=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sparse_ft-benchmark")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3, help="of ours and the limit; medians are printed")
    options = parser.parse_args()
    folder = options.folder / options.scale
    if not (folder / "config.json").is_file():
        print(f"writing {folder} ...", flush=True)
        write_checkpoint(folder, options.scale)
    checkpoint, scratch = Checkpoint(folder), options.folder / "scratch"
    weights = sum(math.prod(shape) for shape in checkpoint.prunable_shapes().values())
    ours(Checkpoint(_small(options.folder)), scratch, 1)  # compiles the loops once; they are cached on disk

    turns = {"limit": limit, "ours": ours, "limit, flushed early": partial(limit, flush_early=True)}
    runs: dict[str, list[Cost]] = {name: [] for name in turns}
    for _ in range(options.repeat):  # by turns, so that all meet the same page cache and the same disk
        for name, work in turns.items():
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            os.sync()
            runs[name].append(measured(lambda work=work: work(checkpoint, scratch, options.threads)))
    shutil.rmtree(scratch, ignore_errors=True)
    available = psutil.virtual_memory().available
    single: dict[str, Cost | None] = {}
    for name, work, bytes_per_weight in (("kthvalue", kthvalue, 15), ("global_unstructured", torch_prune, 38)):
        fits = weights * bytes_per_weight < available
        single[name] = measured(lambda work=work: work(checkpoint)) if fits else None

    best = {
        name: Cost(
            median(c.seconds for c in costs), median(c.processor_seconds for c in costs), max(c.peak for c in costs)
        )
        for name, costs in runs.items()
    }
    print(f"\n{weights / 1e9:.3f} billion prunable weights, bfloat16, {len(checkpoint.files)} shards;", end=" ")
    print(f"{options.threads} threads on {platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}\n")
    print("| what | seconds | x ours | processor seconds | x ours | peak memory |")
    print("|---|---:|---:|---:|---:|---:|")
    mine = best["ours"]

    def row(what: str, cost: Cost) -> None:
        wall, used = cost.seconds / mine.seconds, cost.processor_seconds / mine.processor_seconds
        print(f"| {what} | {cost.seconds:.2f} | {wall:.2f} ", end="")
        print(f"| {cost.processor_seconds:.2f} | {used:.2f} | {cost.peak / 1e9:.2f} GB |")

    row("ours: ten global levels, written", mine)
    row("limit: read twice, write the masks' bytes", best["limit"])
    row("the same, flushed early", best["limit, flushed early"])
    for name, what in (("kthvalue", "torch.kthvalue"), ("global_unstructured", "prune.global_unstructured")):
        cost = single[name]
        if cost is None:
            print(f"| {what}, one level, nothing written | does not fit into memory | | | | |")
        else:
            row(f"{what}, one level, nothing written", cost)
    print("\nall runs, seconds:", {name: [round(c.seconds, 2) for c in costs] for name, costs in runs.items()})
    for name in ("limit", "limit, flushed early"):
        print(f"ours / {name} = {mine.seconds / best[name].seconds:.2f} (goal: at most 2)")
    if single["kthvalue"] is not None:
        print(f"ten times kthvalue / ours = {10 * single['kthvalue'].seconds / mine.seconds:.0f} (goal: at least 30)")


def _small(folder: Path) -> Path:
    target = folder / "20m"
    if not (target / "config.json").is_file():
        write_checkpoint(target, "20m")
    return target


if __name__ == "__main__":
    main()
