from dataclasses import replace

import pytest

from sparse_ft.study.config import CellConfig


def test_a_key_ignores_where_results_go_and_nothing_else():
    cell = CellConfig()
    same = [replace(cell, output_dir="elsewhere"), replace(cell, register_as="auto"), replace(cell, keep="all")]
    assert {other.key() for other in same} == {cell.key()}
    changes = [{"seed": 1}, {"sparsity": 0.6}, {"eval_limit": 3}, {"dtype": "float32"}]
    others = [replace(cell, **change) for change in changes]
    keys = {other.key() for other in others} | {cell.key("masks"), cell.key("", "2.0"), cell.key()}
    assert len(keys) == len(others) + 3


def test_a_dense_cell_is_the_same_whatever_it_would_have_pruned():
    dense = CellConfig(mode="dense")
    assert replace(dense, method="structured", sparsity=0.9, importance="wanda").key() == dense.key()


@pytest.mark.parametrize(
    ("cell", "title"),
    [
        (CellConfig(mode="dense"), "dense · boolq · smollm2-135m"),
        (CellConfig(model="a/b-7b", sparsity=0.125), "12.5 % s2s unstructured magnitude · boolq · b-7b"),
        (CellConfig(mode="sparse_to_dense", sparsity=0.7), "70 % s2d unstructured magnitude · boolq · smollm2-135m"),
        (CellConfig(method="random"), "50 % s2s random · boolq · smollm2-135m"),
    ],
)
def test_titles(cell, title):
    assert cell.title == title
