"""Every rule of the tables with every update, allocation and refinement that goes with it.

What these do is done to matrices, whatever the family: one with experts, of which some see few tokens, is enough beside
a dense one. Every family is in tests/models/test_matrix.py.
"""

from itertools import product

import pytest
import torch

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.settings.rules import ALLOCATIONS, METHODS, REFINEMENTS, RULES, SCOPES, UPDATES
from sparse_ft.validation import validate_checkpoint

KINDS = ["tiny-llama", "tiny-mixtral"]
LEVELS = (0.3, 0.6)


def combinations(**axes):
    """The values of some fields that `PruningSettings` takes together, as one dict each."""
    found = []
    for values in product(*axes.values()):
        how = dict(zip(axes, values, strict=True))
        levels = (0.5,) if how.get("method") == "semi_structured" else LEVELS
        if not list(PruningSettings(sparsities=levels, **how).problems()):
            found.append({"sparsities": levels, **how})
    return found


def named(how):
    return "-".join(str(value) for name, value in how.items() if name != "sparsities")


def check(folder, text, out, how):
    settings = PruningSettings(dtype="float32", **how)
    results = MaskGenerator(folder, settings, Calibration(text, {"task": "noise"})).generate(out, figures="none")
    dense, below = Checkpoint(folder), None
    for level, result in zip(settings.levels, results, strict=True):
        masks = result.load()
        assert set(masks) == set(dense.prunable)
        if settings.method == "semi_structured":
            assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())
        elif settings.method != "structured":
            exact = settings.scope == "global" or settings.allocation != "uniform"
            assert masks.n_pruned == pytest.approx(level * masks.n_weights, abs=1 if exact else 0.02 * masks.n_weights)
        assert (result.checkpoint is None) == (not settings.changes_weights)
        if result.checkpoint is not None:
            assert validate_checkpoint(result.checkpoint, masks).ok
            new = Checkpoint(result.checkpoint)
            assert not any(torch.signbit(new.tensor(name)[~mask]).any() for name, mask in masks.items())  # +0.0
        if below is not None:
            assert not any((masks[name] & ~below[name]).any() for name in masks)
        below = masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", combinations(importance=RULES, update=UPDATES, method=("unstructured", "semi_structured")), ids=named
)
def test_rules_and_updates(tiny_model, text, tmp_path, kind, how):
    check(tiny_model(kind), text, tmp_path, how)


@pytest.mark.parametrize(
    "how",
    combinations(importance=("wanda", "alps"), allocation=list(ALLOCATIONS)[1:], scope=SCOPES, update=("auto", "refit"))
    + combinations(importance=("magnitude", "wanda", "alps"), refine=list(REFINEMENTS)[1:], scope=SCOPES,
                   update=("none", "refit"))
    + combinations(method=METHODS, update=list(UPDATES)[1:]),
    ids=named,
)  # fmt: skip
def test_allocations_refinements_and_methods(tiny_model, text, tmp_path, how):
    check(tiny_model("tiny-llama"), text, tmp_path, how)


@pytest.fixture
def text():
    """Token ids for the tiny models, int64 [4, 24]."""
    return torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(9))
