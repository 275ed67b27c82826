"""What to prune and how: one checked value, and the names that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_ft.errors import UserError
from sparse_ft.levels import level_label

__all__ = ["IMPORTANCES", "METHODS", "SCOPES", "Calibration", "PruningSettings"]

METHODS = ("unstructured", "structured", "random", "semi_structured")
IMPORTANCES = ("magnitude", "gradient", "taylor", "wanda", "sparsegpt")
SCOPES = ("global", "layer", "row")
ALLOCATIONS = ("uniform", "owl")
STATISTICS = ("none", "gradients", "activations")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Calibration:
    """Text that importances look at.

    Attributes:
        token_ids: int64 ``[samples, seq_len]``, without padding.
        description: what it is (task, samples, length, seed); goes into the masks' metadata.
    """

    token_ids: torch.Tensor
    description: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError if the ids are not int64 ``[samples >= 1, seq_len >= 2]``."""
        ids = self.token_ids
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise UserError(
                f"Calibration data must be int64 [samples, seq_len] with at least 1 x 2 tokens, not {ids.dtype}"
                f" {list(ids.shape)}. Give more text, or a smaller calibration_seq_len."
            )


@dataclass(frozen=True)
class PruningSettings:
    """How to make masks. `check` refuses every combination that makes no sense.

    Attributes:
        method: ``unstructured``, ``structured`` (MLP channels and attention groups), ``random``,
            ``semi_structured`` (N:M).
        importance: ``magnitude``, ``gradient``, ``taylor``, ``wanda``, ``sparsegpt``, or a callable
            ``(weight, Statistics) -> scores`` (float, of the weight's shape; large = keep).
        scope: ``global``, ``layer`` (per tensor) or ``row`` (per output row).
        sparsities: the levels, each 0..1; all come from the same passes and are nested.
        pattern_n, pattern_m: of every ``pattern_m`` consecutive inputs ``pattern_n`` are kept (semi_structured).
        allocation: ``uniform``, or ``owl`` (blocks with more outliers keep more).
        calibration_samples, calibration_seq_len: how much text data-driven importances see.
        seed: of ``random``, and of the calibration text.
        device, dtype: where and in which precision the model runs (data-driven importances only).
        force: allow what is known to collapse (global Wanda).
        threads: for streaming; None = all cores this process may use.
        statistics: what a callable importance is given: ``none``, ``gradients`` or ``activations``.
        owl_outlier, owl_range: OWL's M (an outlier is M times the mean) and lambda (largest deviation).
    """

    method: str = "unstructured"
    importance: str | Callable = "magnitude"
    scope: str = "layer"
    sparsities: tuple[float, ...] = (0.5,)
    pattern_n: int = 2
    pattern_m: int = 4
    allocation: str = "uniform"
    calibration_samples: int = 64
    calibration_seq_len: int = 256
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    force: bool = False
    threads: int | None = None
    statistics: str = "none"
    owl_outlier: float = 5.0
    owl_range: float = 0.08

    @property
    def statistics_needed(self) -> str:
        """``none``, ``gradients`` or ``activations``: what the importance looks at besides the weight."""
        if self.method == "random" or self.importance == "magnitude":
            return "none"
        if callable(self.importance):
            return self.statistics
        return "gradients" if self.importance in ("gradient", "taylor") else "activations"

    @property
    def needs_calibration(self) -> bool:
        return self.statistics_needed != "none" or self.allocation == "owl"

    @property
    def importance_name(self) -> str:
        """For metadata: the callable's own name; random masks have no importance."""
        if self.method == "random":
            return "random"
        return getattr(self.importance, "__name__", "custom") if callable(self.importance) else self.importance

    @property
    def label(self) -> str:
        """The method as file names say it."""
        if self.method == "semi_structured":
            return f"semi_structured_{self.pattern_n}of{self.pattern_m}"
        return self.method

    @property
    def levels(self) -> tuple[float, ...]:
        """The sparsities, ascending: the order of nesting."""
        return tuple(sorted(self.sparsities))

    def check(self) -> None:
        """Refuses values and combinations that make no sense.

        Raises:
            UserError: naming all of them; combinations only of values that make sense by themselves.
        """
        problems = [*self._unknown_choices(), *self._wrong_numbers()]
        problems = problems or [why for refused, why in self._refusals() if refused]
        if problems:
            raise UserError(" ".join(problems))

    def _unknown_choices(self) -> Iterator[str]:
        choices = {"method": METHODS, "scope": SCOPES, "allocation": ALLOCATIONS, "statistics": STATISTICS}
        choices |= {"dtype": _DTYPES} | ({} if callable(self.importance) else {"importance": IMPORTANCES})
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"{name} '{getattr(self, name)}' is none of {', '.join(allowed)}."

    def _wrong_numbers(self) -> Iterator[str]:
        levels = self.sparsities
        if not levels:
            yield "sparsities is empty. Give at least one level, such as 0.5."
        wrong = [x for x in levels if not (isinstance(x, (int, float)) and math.isfinite(x) and 0 <= x <= 1)]
        if wrong:
            yield f"sparsities: {', '.join(map(str, wrong))} is not between 0 and 1. 50 % is 0.5."
        elif len({level_label(level) for level in levels}) < len(levels):
            yield f"sparsities name one level twice: {', '.join(map(str, levels))}."
        if self.threads is not None and self.threads < 1:
            yield f"threads is {self.threads}; give at least 1, or leave it out for all cores."
        if self.needs_calibration and (self.calibration_samples < 1 or self.calibration_seq_len < 2):
            yield "calibration_samples must be at least 1 and calibration_seq_len at least 2."
        if self.owl_outlier <= 0 or not 0 <= self.owl_range <= 0.5:
            yield "owl_outlier must be above 0 and owl_range between 0 and 0.5."

    def _refusals(self) -> list[tuple[bool, str]]:
        n, m = self.pattern_n, self.pattern_m
        grouped = self.method == "semi_structured"
        return [
            (
                self.method == "random" and self.importance != "magnitude",
                f"method random looks at no weight, so importance {self.importance} means nothing. Leave it out.",
            ),
            (
                self.importance == "wanda" and self.scope == "global" and not self.force,
                "Wanda's scores do not compare across layers: one global threshold is known to collapse the model"
                " (perplexity 15,093 against 19.66 on a 3B model). Take scope row, or force it.",
            ),
            (
                self.importance == "sparsegpt" and self.method not in ("unstructured", "semi_structured"),
                f"SparseGPT prunes unstructured or semi_structured, not {self.method}. Take another importance.",
            ),
            (
                self.importance == "sparsegpt" and self.scope != "layer",
                f"SparseGPT chooses within blocks of columns of each tensor; scope {self.scope} is not its own."
                " Take scope layer.",
            ),
            (
                self.method == "structured" and self.scope == "row",
                "structured pruning removes whole channels and heads, so scope row means nothing. Take layer"
                " (the same number in every block, can be shrunk) or global.",
            ),
            (
                grouped and self.scope == "global",
                "semi_structured keeps N of every M neighbours, so scope global means nothing. Take layer.",
            ),
            (
                grouped and not 1 <= n < m <= 256,
                f"The pattern {n}:{m} is none: N of M needs 1 <= N < M <= 256.",
            ),
            (
                grouped and any(abs(level - (1 - n / max(m, 1))) > 1e-9 for level in self.sparsities),
                f"The pattern {n}:{m} has sparsity {1 - n / max(m, 1):g} and no other; sparsities says"
                f" {', '.join(f'{level:g}' for level in self.sparsities)}.",
            ),
            (
                self.allocation == "owl" and (self.method != "unstructured" or self.scope == "global"),
                "OWL gives every block its own sparsity: it needs method unstructured and scope layer or row.",
            ),
        ]
