"""Exact selection of the k smallest keys from counts: where each level cuts, ties included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Cut", "cut_counts", "cut_digits", "exact_count", "share_ties"]


@dataclass(frozen=True)
class Cut:
    """What one level prunes: every key below ``key``, and the first ``ties`` keys equal to it.

    ``Cut(0, 0)`` prunes nothing.
    """

    key: int
    ties: int

    def bound(self, equal: int) -> int | None:
        """The smallest key kept in a part that holds ``equal`` keys equal to ``key``, if one bound says it.

        None when some but not all of the equal keys are pruned, so that position decides.
        """
        if min(self.ties, equal) == 0:
            return self.key
        return self.key + 1 if self.ties >= equal else None


def exact_count(sparsity: float, n: int) -> int:
    """round(sparsity * n), the number of weights a level prunes out of ``n`` (half to even, as Python)."""
    return min(n, max(0, round(sparsity * n)))


def cut_counts(counts: np.ndarray, ks: Sequence[int]) -> list[Cut]:
    """Where to cut for each k in ``ks``, given how often each key occurs.

    Args:
        counts: integer ``[keys]``.
        ks: how many of the smallest keys to prune, 0..counts.sum().

    Raises:
        ValueError: a k outside that range.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1])
    cuts = []
    for k in ks:
        if not 0 <= k <= total:
            raise ValueError(f"cannot prune {k} of {total} weights")
        if k == 0:
            cuts.append(Cut(0, 0))
            continue
        key = int(np.searchsorted(ends, k))  # the first key at whose end at least k have passed
        cuts.append(Cut(key, k - int(ends[key] - counts[key])))
    return cuts


def cut_digits(coarse: Sequence[Cut], prefixes: Sequence[int], counts: np.ndarray) -> list[Cut]:
    """Refines cuts on the high 16 bits of 32-bit keys by the counts of the low 16 bits.

    Args:
        coarse: cuts from the histogram of the high halves.
        prefixes: the high halves that were looked into, one row of ``counts`` each.
        counts: integer ``[len(prefixes), 65536]``.
    """
    row = {prefix: index for index, prefix in enumerate(prefixes)}
    cuts = []
    for cut in coarse:
        if cut.ties == 0:
            cuts.append(Cut(0, 0))
            continue
        fine = cut_counts(counts[row[cut.key]], [cut.ties])[0]
        cuts.append(Cut((cut.key << 16) | fine.key, fine.ties))
    return cuts


def share_ties(cut: Cut, equal: Sequence[int]) -> list[Cut]:
    """One cut over several parts in order, as one cut per part: earlier parts give their ties first.

    Args:
        equal: how many keys equal to ``cut.key`` each part holds.
    """
    cuts, left = [], cut.ties
    for count in equal:
        taken = min(left, int(count))
        cuts.append(Cut(cut.key, taken))
        left -= taken
    return cuts
