"""The standard error of a mean over tokens that come in samples: answers, or windows of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["ratio_standard_error"]


def ratio_standard_error(totals: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of ``sum(totals) / sum(sizes)``, a sample being one pair; NaN for fewer than two.

    The tokens of an answer depend on each other, so what is independent is the sample: this is the error of a
    ratio of two sums over samples, linearised (Cochran, Sampling Techniques, 3rd ed., chapter 6). With samples of
    equal size it is the standard error of the mean of their means.

    Args:
        totals: nats of each sample.
        sizes: tokens of each sample, their sum above 0.
    """
    count, size = len(totals), sum(sizes)
    if count < 2:
        return math.nan
    ratio = math.fsum(totals) / size
    squares = math.fsum((total - ratio * tokens) ** 2 for total, tokens in zip(totals, sizes, strict=True))
    return math.sqrt(count / (count - 1) * squares) / size
