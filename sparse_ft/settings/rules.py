"""The rules by which weights go, how levels are shared out, what betters a mask, and the updates of what stays: one row
each. No torch here.

A row names its function, ``module:function`` of `sparse_ft.pruning`, which is loaded when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "ACTIVATIONS",
    "ALLOCATIONS",
    "AUTO",
    "EXPERTS",
    "GRADIENTS",
    "HESSIANS",
    "MAGNITUDE",
    "METHODS",
    "NOTHING",
    "RANDOM",
    "REAP",
    "RECONSTRUCTIONS",
    "REFINEMENTS",
    "RULES",
    "SCOPES",
    "STEPS",
    "UNIFORM",
    "UPDATES",
    "Allocation",
    "Refinement",
    "Rule",
    "Update",
    "allocations_help",
    "rule_label",
]

NOTHING, GRADIENTS, ACTIVATIONS, HESSIANS = "none", "gradients", "activations", "hessians"
AUTO = "auto"  # of the updates: the importance's own
EXPERTS = "experts"  # the method that removes whole experts of mixtures
WEIGHTS = ("unstructured", "semi_structured", "structured", "random")  # those that remove weights of all linear maps
METHODS = (*WEIGHTS, EXPERTS)  # in the order of tables
SCOPES = ("global", "layer", "row")
RECONSTRUCTIONS = ("none", "block")
# What may follow the choice of a mask, in its order: the fields that say it.
STEPS = ("refine", "update", "reconstruct")


@dataclass(frozen=True)
class Rule:
    """What decides which weights go.

    Attributes:
        name: as flags and files spell it. title: in messages.
        needs: what it looks at beside the weights: NOTHING, GRADIENTS, ACTIVATIONS or HESSIANS.
        function: ``(weight, Statistics) -> scores`` (see `sparse_ft.pruning.importance`); of a rule that needs
            HESSIANS, ``(weight, Inputs, k, pattern, pruned) -> (weights, kept)`` (see `sparse_ft.pruning.sparsegpt`);
            of method experts, ``(gates, norms) -> contributions`` (see `sparse_ft.pruning.experts`).
        sums: of GRADIENTS, which are gathered.
        methods, scopes: those that it goes with.
        collapses: scopes that are only taken by force, and why.
        update: the update that ``auto`` stands for. Of a rule that needs HESSIANS, its own: the weights that its
            function returns.
    """

    name: str
    title: str
    needs: str
    function: str | Callable
    sums: tuple[str, ...] = ("gradient", "product")
    methods: tuple[str, ...] = WEIGHTS
    scopes: tuple[str, ...] = SCOPES
    collapses: Mapping[str, str] = field(default_factory=dict)
    update: str = "none"


@dataclass(frozen=True)
class Allocation:
    """How a level is shared out between blocks.

    Attributes:
        which: the blocks that keep more, for --help.
        figure: ``(a block's scores |w| ||x||, tensor by tensor, *options) -> float``; None: all are at the level.
        deviations: ``(figures of all blocks, spread) -> how much denser than the level each is``.
        options: the fields of PruningSettings that the figure is given.
        spread: the field that says how far a block may be from the level.
        methods, scopes: those that it goes with.
    """

    name: str
    title: str
    which: str = ""
    figure: str | None = None
    deviations: str = ""
    options: tuple[str, ...] = ()
    spread: str = ""
    methods: tuple[str, ...] = ("unstructured",)
    scopes: tuple[str, ...] = ("layer", "row")

    @property
    def needs(self) -> str:
        """What it looks at beside the weights."""
        return NOTHING if self.figure is None else ACTIVATIONS


@dataclass(frozen=True)
class Refinement:
    """What betters a mask for weights that keep their values, before any update.

    Attributes:
        function: ``(weight, kept, Inputs, pattern, pruned) -> kept`` (see `sparse_ft.pruning.swaps`); None leaves
            masks as they are.
        refused: methods and scopes that it does not go with, and why.
    """

    name: str
    title: str
    function: str | None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> str:
        """What it looks at beside weights and masks."""
        return NOTHING if self.function is None else HESSIANS


@dataclass(frozen=True)
class Update:
    """What becomes of the weights that stay.

    Attributes:
        function: ``(weight, kept, Inputs) -> weights``; None leaves them as they are.
    """

    name: str
    title: str
    function: str | None

    @property
    def changes_weights(self) -> bool:
        """Whether the masks belong to other weights than those they were made from."""
        return self.function is not None

    @property
    def needs(self) -> str:
        """What it looks at beside the weights."""
        return HESSIANS if self.changes_weights else NOTHING


MAGNITUDE = Rule("magnitude", "Magnitude", NOTHING, "importance:magnitude")
RANDOM = Rule("random", "Random", NOTHING, "")  # of method random, which looks at no weight
REAP = Rule("reap", "REAP", ACTIVATIONS, "experts:reap", methods=(EXPERTS,), scopes=("layer",))
RULES = {
    rule.name: rule
    for rule in (
        MAGNITUDE,
        Rule("gradient", "Gradient", GRADIENTS, "importance:gradient", sums=("gradient",)),
        Rule("taylor", "Taylor", GRADIENTS, "importance:taylor", sums=("product",)),
        Rule(
            "wanda",
            "Wanda",
            ACTIVATIONS,
            "importance:wanda",
            collapses={
                "global": "Wanda's scores do not compare across layers: one global threshold is known to collapse the"
                " model (perplexity 15,093 against 19.66 on a 3B model). Take scope row, or force it."
            },
        ),
        Rule(
            "sparsegpt",
            "SparseGPT",
            HESSIANS,
            "sparsegpt:choose",
            methods=("unstructured", "semi_structured"),
            scopes=("layer",),
            update="sparsegpt",
        ),
        Rule(
            "alps",
            "ALPS",
            HESSIANS,
            "alps:choose",
            methods=("unstructured", "semi_structured"),
            scopes=("layer",),
            update="refit",
        ),
        REAP,
    )
}
UNIFORM = Allocation("uniform", "Uniform", methods=METHODS, scopes=SCOPES)
ALLOCATIONS = {
    allocation.name: allocation
    for allocation in (
        UNIFORM,
        Allocation(
            "owl",
            "OWL",
            "those with more outliers",
            "allocation:outlier_share",
            "allocation:owl_deviations",
            options=("owl_outlier",),
            spread="owl_range",
        ),
        Allocation(
            "dlp",
            "DLP",
            "those with a lower median score",
            "allocation:middle_score",
            "allocation:dlp_deviations",
            spread="dlp_range",
        ),
    )
}
REFINEMENTS = {
    refinement.name: refinement
    for refinement in (
        Refinement("none", "No refinement", None),
        Refinement(
            "swaps",
            "SparseSwaps",
            "swaps:refine",
            refused={
                "structured": "whole channels and heads go together, and a swap takes single weights",
                "random": "random masks are the control that others have to beat, and bettered ones are none",
                "global": "one ranking over the model decides between rows, and swaps undo it within every row",
            },
        ),
    )
}
UPDATES = {
    update.name: update
    for update in (
        Update("none", "No update", None),
        Update("sparsegpt", "SparseGPT", "sparsegpt:update"),
        Update("refit", "Refit", "refit:update"),
    )
}


def allocations_help() -> str:
    """What there is to choose from, in one sentence."""
    uneven = (f"{row.which} keep more ({row.name})" for row in ALLOCATIONS.values() if row.figure is not None)
    return f"how a level is shared out between blocks: alike ({UNIFORM.name}), or {', or '.join(uneven)}."


def rule_label(importance: str, said: Mapping[str, str | None]) -> str:
    """A choice and what follows it as tables and titles name them: ``wanda``, ``wanda+swaps+refit``.

    Args:
        said: the STEPS by name, among others. None is not named, nor an update that is the importance's own.
    """
    rule = RULES.get(importance, RANDOM)
    own = {"update": (None, AUTO, rule.update)}
    steps = [said.get(step) for step in STEPS if said.get(step) not in own.get(step, (None, "none"))]
    return "+".join([importance, *steps]) if steps else importance
