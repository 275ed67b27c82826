"""From keys to masks of every level, exactly, in two readings, with memory for a few parts of a tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

import numpy as np

from sparse_ft.masks.histogram import Cut, cut_counts, cut_digits, exact_count, share_ties
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.kernels import (
    add_digit_histogram,
    add_histogram,
    count_equal,
    group_ranks,
    pack_at_least,
    row_ranks,
)
from sparse_ft.pruning.sources import KeySource

__all__ = ["MaskSink", "MemorySink", "Pool", "write_global", "write_groups", "write_layers", "write_rows"]

_NARROW = 32768  # keys of 15 bits
_DIGIT = 65536
Tasks = Mapping[str, Callable[[], object]]


class MaskSink(Protocol):
    """Takes packed rows of a level's mask; the rows of one tensor come in order."""

    def append(self, level: int, name: str, packed: np.ndarray) -> None: ...


class MemorySink:
    """Keeps the packed masks: ``levels[level][name]`` is ``uint8 [..., ceil(C/8)]`` once all rows came."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], levels: int):
        self.shapes = dict(shapes)
        self._rows: list[dict[str, list[np.ndarray]]] = [{} for _ in range(levels)]

    def append(self, level: int, name: str, packed: np.ndarray) -> None:
        self._rows[level].setdefault(name, []).append(packed)

    def packed(self, level: int, name: str) -> np.ndarray:
        """The whole packed mask of one tensor."""
        rows = np.concatenate(self._rows[level][name])
        return rows.reshape(*self.shapes[name][:-1], rows.shape[-1])


def write_global(
    source: KeySource,
    sparsities: Sequence[float],
    sink: MaskSink,
    threads: int = 1,
    progress: Progress = SILENT,
) -> None:
    """One threshold over all tensors: at each level exactly round(sparsity * n) weights, ties in name order.

    Keys of 15 bits take two readings. Wider keys (float32, or several dtypes side by side) take one more for
    the low digit, and one more where ties at a threshold have to be shared out between tensors.
    """
    names = sorted(source.shapes)
    ks = [exact_count(sparsity, _size(source, names)) for sparsity in sparsities]
    wide = any(source.wide(name) for name in names) or len({source.kind(name) for name in names}) > 1
    pool = Pool(source, threads, progress)
    if wide:
        shares = _wide_cuts(source, names, ks, pool)
    else:
        tables = pool.run("count weights", {name: _call(_counts, source, name) for name in names})
        merged = np.zeros(_NARROW, np.int64)
        for table in tables.values():
            merged += table
        shares = _share(names, cut_counts(merged, ks), lambda name, cut: int(tables[name][cut.key]))
    tasks = {name: _call(_write_cuts, source, name, shares[name], sink, wide) for name in names}
    pool.run("write masks", tasks)


def write_layers(
    source: KeySource,
    counts: Mapping[str, Sequence[int]],
    sink: MaskSink,
    threads: int = 1,
    progress: Progress = SILENT,
) -> None:
    """One threshold per tensor: ``counts[name][level]`` weights of each tensor, ties by position."""

    def task(name: str) -> None:
        ks = counts[name]
        if source.wide(name):
            coarse_counts = _high_counts(source, name)
            coarse = cut_counts(coarse_counts, ks)
            prefixes = _prefixes(coarse)
            fine = _low_counts(source, name, prefixes)
            cuts = cut_digits(coarse, prefixes, fine)
            row = {prefix: index for index, prefix in enumerate(prefixes)}
            equal = [int(fine[row[cut.key >> 16], cut.key & 0xFFFF]) if cut.ties else 0 for cut in cuts]
        else:
            table = _counts(source, name)
            cuts = cut_counts(table, ks)
            equal = [int(table[cut.key]) for cut in cuts]
        _write_cuts(source, name, list(zip(cuts, equal, strict=True)), sink, False)

    Pool(source, threads, progress).run("make masks", {name: _call(task, name) for name in sorted(source.shapes)})


def write_rows(
    source: KeySource,
    counts: Mapping[str, Sequence[int | np.ndarray]],
    sink: MaskSink,
    threads: int = 1,
    progress: Progress = SILENT,
) -> None:
    """``counts[name][level]`` weights of every row (one number, or ``[rows]`` of them), ties by position."""

    def task(name: str) -> None:
        rows = int(np.prod(source.shapes[name][:-1], dtype=np.int64))
        bounds = [np.broadcast_to(k, rows).astype(np.uint32) for k in counts[name]]
        first = 0
        for keys in source.parts(name):
            ranks = np.empty(keys.shape, np.uint32)
            row_ranks(keys, ranks)
            for level, bound in enumerate(bounds):
                sink.append(level, name, _pack(ranks, bound[first : first + len(ranks)]))
            first += len(ranks)

    Pool(source, threads, progress).run("make masks", {name: _call(task, name) for name in sorted(source.shapes)})


def write_groups(
    source: KeySource,
    kept: int,
    group: int,
    sink: MaskSink,
    threads: int = 1,
    progress: Progress = SILENT,
) -> None:
    """N:M: of every ``group`` consecutive weights of a row the ``kept`` largest stay, ties by position.

    Every tensor's last axis must be a multiple of ``group``, which is at most 256.
    """

    def task(name: str) -> None:
        for keys in source.parts(name):
            ranks = np.empty(keys.shape, np.uint8)
            group_ranks(keys, group, ranks)
            sink.append(0, name, _pack(ranks, np.full(len(ranks), group - kept, np.uint8)))

    Pool(source, threads, progress).run("make masks", {name: _call(task, name) for name in sorted(source.shapes)})


class Pool:
    """Runs one task per tensor in threads (the compiled loops release the GIL), largest tensors first."""

    def __init__(self, source: KeySource, threads: int, progress: Progress):
        self._source, self._threads, self._progress = source, max(1, threads), progress

    def run(self, stage: str, tasks: Tasks) -> dict[str, object]:
        total = sum(self._source.nbytes(name) for name in tasks)
        self._progress.start(stage, total, "B")
        results: dict[str, object] = {}
        stop = threading.Event()

        def guarded(name: str) -> object:
            return None if stop.is_set() else tasks[name]()

        with ThreadPoolExecutor(self._threads, "masks") as executor:
            order = sorted(tasks, key=self._source.nbytes, reverse=True)
            futures = {executor.submit(guarded, name): name for name in order}
            try:
                for future in as_completed(futures):
                    name = futures[future]
                    results[name] = future.result()
                    self._progress.advance(self._source.nbytes(name))
            finally:
                stop.set()  # after an error the tensors not yet begun are left alone
        self._progress.stop()
        return results


def _call(function: Callable, *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _size(source: KeySource, names: Iterable[str]) -> int:
    return sum(int(np.prod(source.shapes[name], dtype=np.int64)) for name in names)


def _counts(source: KeySource, name: str) -> np.ndarray:
    counts = np.zeros(_NARROW, np.uint32)
    for keys in source.parts(name):
        add_histogram(keys.reshape(-1), counts)
    return counts


def _high_counts(source: KeySource, name: str) -> np.ndarray:
    counts = np.zeros(_DIGIT, np.uint32)
    for keys in source.parts(name, widen=True):
        add_histogram((keys >> np.uint32(16)).astype(np.uint16).reshape(-1), counts)
    return counts


def _low_counts(source: KeySource, name: str, prefixes: Sequence[int]) -> np.ndarray:
    counts = np.zeros((len(prefixes), _DIGIT), np.uint32)
    if prefixes:
        wanted = np.array(prefixes, np.int64)
        for keys in source.parts(name, widen=True):
            add_digit_histogram(keys.reshape(-1), wanted, counts)
    return counts


def _equal_counts(source: KeySource, name: str, cuts: Sequence[Cut]) -> list[int]:
    equal = [0] * len(cuts)
    for keys in source.parts(name, widen=True):
        for index, cut in enumerate(cuts):
            equal[index] += int(count_equal(keys.reshape(-1), np.uint32(cut.key)))
    return equal


def _prefixes(coarse: Sequence[Cut]) -> list[int]:
    return sorted({cut.key for cut in coarse if cut.ties})


def _wide_cuts(
    source: KeySource, names: Sequence[str], ks: Sequence[int], pool: Pool
) -> dict[str, list[tuple[Cut, int]]]:
    high = np.zeros(_DIGIT, np.int64)
    for table in pool.run("count weights", {name: _call(_high_counts, source, name) for name in names}).values():
        high += table
    coarse = cut_counts(high, ks)
    prefixes = _prefixes(coarse)
    low = np.zeros((len(prefixes), _DIGIT), np.int64)
    lock = threading.Lock()

    def add(name: str) -> None:  # a table per tensor, kept until the end, would be gigabytes
        table = _low_counts(source, name, prefixes)
        with lock:
            np.add(low, table, out=low)

    pool.run("count low digits", {name: _call(add, name) for name in names})
    cuts = cut_digits(coarse, prefixes, low)
    total = [int(low[prefixes.index(cut.key >> 16), cut.key & 0xFFFF]) if cut.ties else 0 for cut in cuts]
    if all(cut.bound(equal) is not None for cut, equal in zip(cuts, total, strict=True)):
        return {name: list(zip(cuts, total, strict=True)) for name in names}
    equal = pool.run("count ties", {name: _call(_equal_counts, source, name, cuts) for name in names})
    position = {cut: index for index, cut in enumerate(cuts)}
    return _share(names, cuts, lambda name, cut: equal[name][position[cut]])


def _share(
    names: Sequence[str], cuts: Sequence[Cut], equal: Callable[[str, Cut], int]
) -> dict[str, list[tuple[Cut, int]]]:
    """Each tensor's own cuts, with the number of its keys equal to each cut's."""
    shares: dict[str, list[tuple[Cut, int]]] = {name: [] for name in names}
    for cut in cuts:
        counts = [equal(name, cut) for name in names]
        for name, part, count in zip(names, share_ties(cut, counts), counts, strict=True):
            shares[name].append((part, count))
    return shares


def _write_cuts(source: KeySource, name: str, cuts: Sequence[tuple[Cut, int]], sink: MaskSink, widen: bool) -> None:
    left = [cut.ties for cut, _ in cuts]
    for keys in source.parts(name, widen):
        for level, (cut, equal) in enumerate(cuts):
            bound = cut.bound(equal)
            if bound is None:
                packed, left[level] = _pack_split(keys, cut.key, left[level])
            else:
                packed = _pack(keys, np.full(len(keys), bound, keys.dtype))
            sink.append(level, name, packed)


def _pack(keys: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    packed = np.empty((len(keys), (keys.shape[1] + 7) // 8), np.uint8)
    pack_at_least(keys, bounds, packed)
    return packed


def _pack_split(keys: np.ndarray, key: int, left: int) -> tuple[np.ndarray, int]:
    """Packs a part in which the first ``left`` of the keys equal to ``key`` are pruned, the others kept."""
    bounds = np.full(len(keys), key, keys.dtype)
    if left == 0:
        return _pack(keys, bounds), 0
    equal = int(count_equal(keys.reshape(-1), keys.dtype.type(key)))
    if equal <= left:
        return _pack(keys, bounds + keys.dtype.type(1)), left - equal
    last = int(np.flatnonzero(keys.reshape(-1) == key)[left - 1])  # the last one that is pruned
    row, column = divmod(last, keys.shape[1])
    bounds[: row + 1] += keys.dtype.type(1)
    packed = _pack(keys, bounds)
    kept = keys[row] > key
    kept[column + 1 :] |= keys[row, column + 1 :] == key
    packed[row] = np.packbits(kept, bitorder="little")
    return packed, 0
