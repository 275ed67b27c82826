"""How large a packed checkpoint is, and how long packing, unpacking and loading take, in bytes and seconds measured.

    python -m benchmarks.packed [--scale 250m] [--folder DIR] [--levels 0.5,0.7,0.9]

Writes a LLaMA-shaped checkpoint of random bfloat16 weights in shards (kept in DIR for the next time), sets weights to
zero by random masks of each level, packs, unpacks and compares the files byte for byte. "prunable" is what masks are
of; "files" are all files of weights with the embedding, which stays whole.
"""

from __future__ import annotations

import argparse
import filecmp
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.masks import SCALES, write_checkpoint
from sparse_ft.files import write_json
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.models.folder import read_json
from sparse_ft.models.loading import from_packed
from sparse_ft.models.packing import pack_checkpoint, packed_bytes, unpack_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="250m")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--levels", default="0.5,0.7,0.9")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)) / arguments.scale
        if not (folder / "config.json").is_file():
            write_checkpoint(folder, arguments.scale)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", config | {"tie_word_embeddings": True})  # it has no head, to be loaded
        print(f"{arguments.scale}: LLaMA-shaped, bfloat16, {torch.get_num_threads()} threads")
        print("sparsity | prunable MB -> packed | times | files MB -> packed | times | pack s | unpack s | load s")
        for level in map(float, arguments.levels.split(",")):
            measure(Checkpoint(folder), level, Path(scratch))


def measure(base: Checkpoint, level: float, scratch: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.rand(shape, generator=generator) >= level for n, shape in base.prunable_shapes().items()}
    masks = MaskSet.from_bool(drawn)
    del drawn
    plain = copy_checkpoint(base, scratch / "plain", lambda n, t: t.masked_fill_(~masks[n], 0) if n in masks else t)
    source = Checkpoint(plain)
    packing, packed = timed(lambda: pack_checkpoint(source, masks, scratch / "packed"))
    unpacking, again = timed(lambda: unpack_checkpoint(packed, scratch / "again"))
    loading, _ = timed(lambda: from_packed(scratch / "packed", "bfloat16", "cpu"))
    names = [file.name for file in source.files]
    assert filecmp.cmpfiles(plain, again, names, shallow=False)[1:] == ([], [])
    before, after = packed_bytes(source, masks)
    own = sum(source.nbytes(name) for name in source.prunable)
    rest = before - own
    files = [sum(file.stat().st_size for file in one.files) for one in (source, packed)]
    print(
        f"{level:8.0%} | {own / 1e6:8.1f} -> {(after - rest) / 1e6:8.1f} | {own / (after - rest):5.2f} |"
        f" {files[0] / 1e6:8.1f} -> {files[1] / 1e6:8.1f} | {files[0] / files[1]:5.2f} |"
        f" {packing:6.1f} | {unpacking:8.1f} | {loading:6.1f}"
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = work()
    return time.perf_counter() - begin, made


if __name__ == "__main__":
    main()
