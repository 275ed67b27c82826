"""A pruning rule is a row and its arithmetic: one is added here in exactly the way that CONTRIBUTING.md describes."""

import sys
from types import ModuleType

import pytest

from sparse_ft.cell.masks import check_mask_set, make_masks
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.parser import Parser
from sparse_ft.settings.rules import ACTIVATIONS, RULES, Rule
from sparse_ft.validation import validate_checkpoint

# What a contributor adds to the table: relative importance and activations (Zhang et al., ICLR 2024).
ALLOWED = {"methods": ("unstructured", "semi_structured"), "scopes": ("layer", "row")}
RIA = Rule("ria", "RIA", ACTIVATIONS, "ria:scores", **ALLOWED)


def scores(weight, statistics):
    """What a contributor writes into sparse_ft/pruning/ria.py."""
    size = weight.float().abs()
    relative = size / size.sum(dim=-1, keepdim=True) + size / size.sum(dim=-2, keepdim=True)
    return relative * statistics.input_norm.sqrt()


@pytest.fixture
def ria(monkeypatch):
    file = ModuleType("sparse_ft.pruning.ria")
    file.scores = scores
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(RULES, RIA.name, RIA)


def asked(folder, *words):
    small = ["--calibration_samples", "2", "--calibration_seq_len", "16", "--data_dir", "made", "--dtype", "float32"]
    argv = ["--model", "tiny-llama", "--importance", "ria", "--scope", "row", "--output_dir", str(folder), *small]
    return Parser(MaskConfig).arguments([*argv, *words])


@pytest.mark.parametrize("update", ["none", "sparsegpt"])
def test_a_rule_is_a_row_and_a_function(ria, tmp_path, update):
    bench = Workbench()
    low, high = make_masks(asked(tmp_path, "--sparsities", "0.3,0.6", "--update", update), bench)
    check_masks(low.load(), bench.checkpoint("tiny-llama").prunable_shapes())
    for name, mask in high.load().items():
        assert ((~mask).sum(1) == round(0.6 * mask.shape[1])).all()
        assert not (mask & ~low.load()[name]).any()
    assert high.metadata["importance"] == "ria"
    assert (high.checkpoint is not None) == (update == "sparsegpt")
    if high.checkpoint is not None:
        assert validate_checkpoint(high.checkpoint, high.load()).ok


def test_what_the_row_does_not_allow_is_refused_in_one_line(ria, tmp_path):
    with pytest.raises(UserError, match="RIA prunes unstructured or semi_structured, not structured"):
        check_mask_set(asked(tmp_path, "--method", "structured", "--scope", "layer"), Workbench())
    with pytest.raises(UserError, match="RIA chooses within scope layer or row; scope global is not its own"):
        check_mask_set(asked(tmp_path, "--scope", "global"), Workbench())


def test_without_its_row_there_is_no_such_rule(tmp_path):
    with pytest.raises(UserError, match="importance is 'ria'; it must be magnitude"):
        asked(tmp_path)
