"""Streaming against a stable sort in memory: dtypes, scopes, shards, threads, part sizes, ties."""

import numpy as np
import pytest
import torch

from sparse_ft.masks.mask_set import unpack_bits
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning import sources
from sparse_ft.pruning.sources import MagnitudeSource
from sparse_ft.pruning.streaming import MemorySink, write_global, write_groups, write_layers, write_rows

LEVELS = [0.0, 0.25, 0.5, 0.500001, 0.9, 1.0]
FEW = torch.tensor([0.0, 0.5, -0.5, 1.0, -2.0])


def stream(folder, scope, threads=1, levels=LEVELS):
    checkpoint = Checkpoint(folder)
    source = MagnitudeSource(checkpoint, checkpoint.prunable)
    sink = MemorySink(source.shapes, len(levels))
    if scope == "global":
        write_global(source, levels, sink, threads)
    elif scope == "layer":
        counts = {n: [round(s * np.prod(shape)) for s in levels] for n, shape in source.shapes.items()}
        write_layers(source, counts, sink, threads)
    else:
        counts = {n: [round(s * shape[-1]) for s in levels] for n, shape in source.shapes.items()}
        write_rows(source, counts, sink, threads)
    return [
        {n: unpack_bits(torch.from_numpy(sink.packed(level, n)), shape[-1]) for n, shape in source.shapes.items()}
        for level in range(len(levels))
    ]


def expected(tensors, names, scope, lowest):
    result = []
    for level in LEVELS:
        if scope == "global":
            whole = torch.cat([tensors[name].float().abs().flatten() for name in names])
            kept = lowest(whole, round(level * whole.numel()))
            parts = kept.split([tensors[name].numel() for name in names])
            result.append({n: part.view(tensors[n].shape) for n, part in zip(names, parts, strict=True)})
        elif scope == "layer":
            result.append({n: lowest(tensors[n].float().abs(), round(level * tensors[n].numel())) for n in names})
        else:
            rows = {n: [lowest(r, round(level * len(r))) for r in tensors[n].float().abs()] for n in names}
            result.append({n: torch.stack(kept) for n, kept in rows.items()})
    return result


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "mixed"])
def test_masks_are_those_of_a_stable_sort(write_llama, lowest, scope, ties, dtype, monkeypatch):
    monkeypatch.setattr(sources, "PART", 300)  # several parts per tensor
    how = {"mixed": True} if dtype == "mixed" else {"dtype": dtype}
    folder, tensors = write_llama(values=FEW if ties else None, **how)
    names = Checkpoint(folder).prunable
    for level, (ours, oracle) in enumerate(
        zip(stream(folder, scope), expected(tensors, names, scope, lowest), strict=True)
    ):
        for name in names:
            assert torch.equal(ours[name], oracle[name]), (LEVELS[level], name)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_shards_threads_and_parts_change_nothing(write_llama, scope, monkeypatch):
    one, _ = write_llama("one", values=FEW)
    many, _ = write_llama("many", values=FEW, shards=5)
    base = stream(one, scope)
    monkeypatch.setattr(sources, "PART", 90)
    for other in (stream(many, scope), stream(many, scope, threads=4), stream(one, scope, threads=3)):
        for left, right in zip(base, other, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 5), (7, 8)])
def test_groups_keep_the_largest_of_every_m(write_llama, pattern):
    kept, group = pattern
    folder, tensors = write_llama(values=FEW, inner=80)
    checkpoint = Checkpoint(folder)
    source = MagnitudeSource(checkpoint, checkpoint.prunable)
    sink = MemorySink(source.shapes, 1)
    write_groups(source, kept, group, sink, threads=2)
    for name, shape in source.shapes.items():
        mask = unpack_bits(torch.from_numpy(sink.packed(0, name)), shape[-1])
        scores = tensors[name].float().abs().view(shape[0], -1, group)
        order = scores.argsort(dim=-1, stable=True)
        oracle = torch.ones_like(scores, dtype=torch.bool).scatter(2, order[..., : group - kept], False)
        assert torch.equal(mask, oracle.view(shape))


def test_an_error_in_one_thread_ends_the_run(write_llama):
    folder, _ = write_llama()
    checkpoint = Checkpoint(folder)
    source = MagnitudeSource(checkpoint, checkpoint.prunable)

    class Broken:
        def append(self, level, name, packed):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_global(source, [0.5], Broken(), threads=2)
