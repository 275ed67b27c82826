"""Where a cell's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Seconds per stage, each stage without the stages inside it, and the total."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds what its block takes to the stage."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent

    def metrics(self) -> dict[str, float]:
        """``time/<stage>_seconds`` and ``time/total_seconds``."""
        total = time.perf_counter() - self._began
        return {**{f"time/{stage}_seconds": s for stage, s in self._seconds.items()}, "time/total_seconds": total}
