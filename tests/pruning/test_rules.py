"""A pruning rule is a row and its arithmetic: those that CONTRIBUTING.md adds are added here."""

import sys
from types import ModuleType

import pytest
from documents import FENCE, section

from sparse_ft.cell.masks import check_mask_set, make_masks
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.settings import rules
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.parser import Parser
from sparse_ft.validation import validate_checkpoint


@pytest.fixture
def ria(monkeypatch):
    """The file and the row that the page adds."""
    arithmetic, row = (body for _, body in FENCE.findall(section("CONTRIBUTING.md", "How to add a pruning rule")))
    file, names = ModuleType("sparse_ft.pruning.ria"), dict(vars(rules))
    exec(arithmetic, vars(file))
    exec(row, names)
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(rules.RULES, "ria", names["RIA"])


def asked(folder, *words):
    small = ["--calibration_samples", "2", "--calibration_seq_len", "16", "--data_dir", "made", "--dtype", "float32"]
    argv = ["--model", "tiny-llama", "--importance", "ria", "--scope", "row", "--output_dir", str(folder), *small]
    return Parser(MaskConfig).arguments([*argv, *words])


@pytest.mark.parametrize("update", rules.UPDATES)
def test_a_rule_is_a_row_and_a_function(ria, tmp_path, update):
    bench = Workbench()
    low, high = make_masks(asked(tmp_path, "--sparsities", "0.3,0.6", "--update", update), bench)
    check_masks(low.load(), bench.checkpoint("tiny-llama").prunable_shapes())
    for name, mask in high.load().items():
        assert ((~mask).sum(1) == round(0.6 * mask.shape[1])).all()
        assert not (mask & ~low.load()[name]).any()
    assert high.metadata["importance"] == "ria"
    assert (high.checkpoint is not None) == (update != "none")
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
