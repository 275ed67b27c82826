"""What to prune and how: the parameters of masks, and the names that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from sparse_ft.errors import UserError
from sparse_ft.levels import level_label, levels_text, parse_levels
from sparse_ft.settings import shared
from sparse_ft.settings.corpora import TASK, corpus_problem, corpus_words
from sparse_ft.settings.field import Settings, setting
from sparse_ft.settings.rules import (
    ACTIVATIONS,
    ALLOCATIONS,
    AUTO,
    EXPERTS,
    GRADIENTS,
    HESSIANS,
    MAGNITUDE,
    METHODS,
    NOTHING,
    RANDOM,
    REAP,
    RECONSTRUCTIONS,
    REFINEMENTS,
    RULES,
    SCOPES,
    STEPS,
    UNIFORM,
    UPDATES,
    Allocation,
    Refinement,
    Rule,
    Update,
    allocations_help,
)

__all__ = ["CALIBRATION", "TUNING", "PruningSettings", "RecipeSettings"]

CALIBRATION = ("calibration_corpus", "calibration_samples", "calibration_seq_len")
TUNING = ("reconstruct_epochs", "reconstruct_batch", "reconstruct_learning_rate")

_rule = partial(setting, masks=True, needed=True, time=False)


@dataclass(frozen=True)
class RecipeSettings(Settings):
    """How weights are chosen, whatever the level. Fields that a cell has no use for (a dense one, random masks) may be
    none."""

    method: str | None = _rule(
        "unstructured",
        "which weights may go: single ones, whole channels and heads, at random, N of M, or whole experts.",
        choices=METHODS,
    )
    importance: str | None = _rule(
        "magnitude",
        "what decides which weights go (random needs none; of method experts the default is reap).",
        choices=RULES,
    )
    refine: str = _rule(
        "none",
        "what betters the masks, for weights that keep their values: nothing, or swaps of a pruned and a kept weight.",
        choices=REFINEMENTS,
        later=True,
    )
    update: str = _rule(
        AUTO,
        "what becomes of the weights that stay; auto is the importance's own update.",
        choices=(AUTO, *UPDATES),
        later=True,
    )
    reconstruct: str = _rule(
        "none",
        "whether the weights that stay are tuned, block by block, until a block gives out what the dense model's does.",
        choices=RECONSTRUCTIONS,
        later=True,
    )
    reconstruct_epochs: int = _rule(2, "of block reconstruction; the best one counts.", least=0, later=True)
    reconstruct_batch: int = _rule(2, "samples of a step of block reconstruction.", least=1, later=True)
    reconstruct_learning_rate: float = _rule(
        2e-4, "of block reconstruction (Adam); it falls linearly to 0.", later=True
    )
    scope: str | None = _rule(
        "layer",
        "one threshold over the model (global), per tensor (layer) or per output row (row).",
        choices=SCOPES,
    )
    pattern: str = _rule("2:4", "kept:group for semi_structured masks, such as 2:4.")
    allocation: str = _rule(UNIFORM.name, allocations_help(), choices=ALLOCATIONS)
    calibration_corpus: str = _rule(
        TASK,
        "text that importances look at: task (its training texts), wikitext2, c4, fineweb_edu (of data_dir/corpora or"
        " the hub, drawn as the papers draw), or a file.",
        path=corpus_words(),
        named=True,
        later=True,
    )
    calibration_samples: int = _rule(64, "number of calibration sequences, for importances that need any.")
    calibration_seq_len: int = _rule(256, "tokens of each calibration sequence.")
    force: bool = _rule(False, "allow pruning that is known to collapse (global wanda).", masks=False, named=True)

    @property
    def n(self) -> int:
        """How many weights of a group the pattern keeps."""
        return self._pattern[0]

    @property
    def m(self) -> int:
        """How many consecutive inputs of the pattern are a group."""
        return self._pattern[1]

    @property
    def _pattern(self) -> tuple[int, int]:
        try:
            kept, group = (int(part) for part in self.pattern.split(":"))
        except ValueError:
            raise UserError(f"pattern is '{self.pattern}'; write kept:group, such as 2:4.") from None
        return kept, group

    @property
    def rule(self) -> Rule:
        """What decides which weights go."""
        if self.method == EXPERTS and self.importance in (None, MAGNITUDE.name):
            return REAP  # the default is of weights
        if self.method == "random" or self.importance is None:
            return RANDOM
        # What a mask file says of itself may be an importance of one's own, whose scores looked at who knows what.
        return RULES.get(self.importance) or Rule(self.importance, self.importance, ACTIVATIONS, "")

    @property
    def allocating(self) -> Allocation:
        """How a level is shared out."""
        return ALLOCATIONS.get(self.allocation, UNIFORM)

    @property
    def refining(self) -> Refinement:
        """What betters the masks."""
        return REFINEMENTS.get(self.refine) or REFINEMENTS["none"]

    @property
    def refines(self) -> bool:
        """Whether masks are bettered after they were chosen."""
        return self.refining.function is not None

    @property
    def updating(self) -> Update:
        """What becomes of the weights that stay."""
        return UPDATES.get(self.update) or UPDATES[self.rule.update]

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are tuned."""
        return self.reconstruct == "block"

    @property
    def changes_weights(self) -> bool:
        """Whether the masks belong to other weights than those they were made from."""
        return self.updating.changes_weights or self.reconstructs

    @property
    def other_update(self) -> str | None:
        """The update where it is not the importance's own: names and identities speak of no other."""
        return None if self.updating.name == self.rule.update else self.updating.name

    @property
    def steps(self) -> dict[str, str]:
        """What follows the choice of the mask, by the field that says it, where names have to speak of it."""
        said = {
            "refine": self.refine if self.refines else None,
            "update": self.other_update,
            "reconstruct": self.reconstruct if self.reconstructs else None,
        }
        return {step: said[step] for step in STEPS if said[step] is not None}

    @property
    def needs_calibration(self) -> bool:
        """Whether the masks, or the weights that stay, depend on text."""
        if self.reconstructs or {self.refining.needs, self.updating.needs} != {NOTHING}:
            return True
        return self.method != "random" and {self.rule.needs, self.allocating.needs} != {NOTHING}

    @property
    def label(self) -> str:
        """The method as file names say it."""
        return f"semi_structured_{self.n}of{self.m}" if self.method == "semi_structured" else str(self.method)


@dataclass(frozen=True)
class PruningSettings(RecipeSettings):
    """How to make masks. `check` refuses every combination that makes no sense.

    In Python ``importance`` may also be a callable ``(weight, Statistics) -> scores`` (float, of the weight's shape;
    large = keep), which is given the ``statistics`` that it asks for. All levels come from the same passes and are
    nested.
    """

    sparsities: tuple[float, ...] = setting(
        (0.5,),
        "levels as a list 0.5,0.7 or as a range 0:0.9:0.1 that includes both ends.",
        read=parse_levels,
        write=levels_text,
    )
    seed: int = shared.seed()
    device: str = shared.device()
    dtype: str = shared.dtype()
    threads: int | None = setting(
        None, "for streaming; None takes all cores that this process may use.", least=1, flag=False
    )
    statistics: str = setting(
        NOTHING, "what a callable importance is given.", choices=(NOTHING, GRADIENTS, ACTIVATIONS), flag=False
    )
    owl_outlier: float = setting(5.0, "OWL's M: an outlier is M times the mean.", flag=False)
    owl_range: float = setting(0.08, "OWL's lambda: the largest deviation.", flag=False)
    dlp_range: float = setting(0.15, "DLP's alpha: the largest deviation.", flag=False)

    @property
    def rule(self) -> Rule:
        """What decides which weights go."""
        if not callable(self.importance) or self.method == "random":
            return super().rule
        name = getattr(self.importance, "__name__", "custom")
        return Rule(name, name, self.statistics, self.importance)

    @property
    def levels(self) -> tuple[float, ...]:
        """The sparsities, ascending: the order of nesting."""
        return tuple(sorted(self.sparsities))

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each; combinations only of values that make sense by
        themselves."""
        problems = [*super().problems(), *self._wrong_values()]
        yield from problems or (why for refused, why in self._refusals() if refused)

    def _wrong_values(self) -> Iterator[str]:
        chosen = self.importance is not None or self.method in ("random", EXPERTS)
        if self.method is None or self.scope is None or not chosen:
            yield "method, importance and scope are needed to make masks; none of them may be none."
        levels = self.sparsities
        if not levels:
            yield "sparsities is empty. Give at least one level, such as 0.5."
        wrong = [x for x in levels if not (isinstance(x, (int, float)) and math.isfinite(x) and 0 <= x <= 1)]
        if wrong:
            yield f"sparsities: {', '.join(map(str, wrong))} is not between 0 and 1. 50 % is 0.5."
        elif len({level_label(level) for level in levels}) < len(levels):
            yield f"sparsities name one level twice: {', '.join(map(str, levels))}."
        if self.needs_calibration and (self.calibration_samples < 1 or self.calibration_seq_len < 2):
            yield "calibration_samples must be at least 1 and calibration_seq_len at least 2."
        if self.needs_calibration and (problem := corpus_problem("calibration_corpus", self.calibration_corpus)):
            yield problem
        if not 0 < self.reconstruct_learning_rate < math.inf:
            yield f"reconstruct_learning_rate is {self.reconstruct_learning_rate}; it must be above 0."
        if self.owl_outlier <= 0:
            yield f"owl_outlier is {self.owl_outlier}; it must be above 0."
        for name in (row.spread for row in ALLOCATIONS.values() if row.spread):
            if not 0 <= getattr(self, name) <= 0.5:
                yield f"{name} is {getattr(self, name)}; it must lie between 0 and 0.5."
        try:
            _ = self.n
        except UserError as error:
            yield str(error)

    def _refusals(self) -> list[tuple[bool, str]]:
        n, m, rule, refining, allocating = self.n, self.m, self.rule, self.refining, self.allocating
        grouped = self.method == "semi_structured"
        return [
            *(
                (
                    word in refining.refused,
                    f"refine {refining.name}, {kind} {word}: {refining.refused.get(word)}. Leave refine out.",
                )
                for kind, word in (("method", self.method), ("scope", self.scope))
            ),
            (
                self.refines and rule.needs == HESSIANS and self.updating.changes_weights,
                f"{rule.title} chooses its mask for weights that are updated, and refine {refining.name} betters it for"
                " weights that keep their values. Leave refine out, or take update none.",
            ),
            (
                self.method == "random" and self.importance not in ("magnitude", None),
                f"method random looks at no weight, so importance {self.importance} means nothing. Leave it out.",
            ),
            (self.scope in rule.collapses and not self.force, rule.collapses.get(self.scope, "")),
            (
                self.method not in rule.methods,
                f"{rule.title} prunes {' or '.join(rule.methods)}, not {self.method}. Take another importance.",
            ),
            (
                self.scope not in rule.scopes,
                f"{rule.title} chooses within scope {' or '.join(rule.scopes)}; scope {self.scope} is not its own."
                f" Take scope {rule.scopes[0]}.",
            ),
            (
                self.method == "structured" and self.scope == "row",
                "structured pruning removes whole channels and heads, so scope row means nothing. Take layer"
                " (the same number in every block, can be shrunk) or global.",
            ),
            (
                self.method == EXPERTS and bool(self.steps),
                f"{', '.join(f'{step} {value}' for step, value in self.steps.items())}: method experts removes whole"
                " experts, and what stays is what it was. Leave it out.",
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
                self.method not in allocating.methods or self.scope not in allocating.scopes,
                f"{allocating.title} gives every block its own sparsity: it needs method"
                f" {' or '.join(allocating.methods)} and scope {' or '.join(allocating.scopes)}.",
            ),
        ]
