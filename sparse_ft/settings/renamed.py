"""Values of parameters that older versions had, and how they are written now: (parameter, value) -> new spelling."""

__all__ = ["RENAMED"]

RENAMED = {("executor", "cerebras"): "trainer=cerebras"}
