from dataclasses import replace

import pytest

from sparse_ft.settings.cell import CellConfig


def test_a_key_ignores_where_results_go_and_nothing_else():
    cell = CellConfig()
    same = [replace(cell, output_dir="elsewhere"), replace(cell, register_as="auto"), replace(cell, keep="all")]
    assert {other.key() for other in same} == {cell.key()}
    changes = [{"seed": 1}, {"sparsity": 0.6}, {"eval_limit": 3}, {"dtype": "float32"}]
    others = [replace(cell, **change) for change in changes]
    assert len({other.key() for other in [cell, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ({"mode": "dense"}, {"method": "structured", "sparsity": 0.9, "importance": "wanda", "pattern": "1:2"}),
        ({"mode": "dense"}, {"allocation": "owl", "calibration_samples": 8, "force": True}),
        ({"method": "random"}, {"importance": "taylor", "scope": "global", "calibration_seq_len": 32}),
        ({"method": "unstructured"}, {"pattern": "1:2", "calibration_samples": 8}),
        ({"method": "semi_structured"}, {"scope": "row"}),
        ({"mode": "full"}, {"lora_r": 64, "lora_alpha": 1.0, "target_modules": "q_proj"}),
    ],
)
def test_fields_that_cannot_matter_make_no_other_cell(values, changes):
    cell = CellConfig(**values)
    for name, value in changes.items():
        assert replace(cell, **{name: value}).key() == cell.key(), name


def test_the_same_fields_tell_cells_apart_where_they_matter():
    for values, changes in [
        ({"importance": "wanda"}, {"calibration_samples": 8, "scope": "row", "allocation": "owl"}),
        ({"method": "semi_structured"}, {"pattern": "1:2"}),
        ({"allocation": "owl"}, {"calibration_seq_len": 8}),
    ]:
        cell = CellConfig(**values)
        for name, value in changes.items():
            assert replace(cell, **{name: value}).key() != cell.key(), name


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


def test_the_rounding_is_part_of_a_cell_but_in_float32():
    for dtype, agree in (("float32", True), ("bfloat16", False), ("float16", False)):
        keys = {CellConfig(dtype=dtype, rounding=rounding).key() for rounding in ("dithered", "nearest")}
        assert (len(keys) == 1) == agree, dtype
