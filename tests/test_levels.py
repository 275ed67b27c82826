from pathlib import Path

import pytest

from sparse_ft.errors import UserError
from sparse_ft.levels import LevelPaths, level_label, levels_text, parse_levels


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("0.5,0.7", (0.5, 0.7)),
        ("0.7, .50,0.7", (0.5, 0.7)),
        ("0:0.9:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
        ("0:0.9:0.2", (0.0, 0.2, 0.4, 0.6, 0.8)),
        ("0.5:0.5:1", (0.5,)),
        ("0,1", (0.0, 1.0)),
    ],
)
def test_lists_and_ranges(text, levels):
    assert parse_levels(text) == levels


@pytest.mark.parametrize("levels", [(0.0, 0.1, 0.5, 1.0), (0.123456789, 1 / 3), (1e-7, 2 / 3, 0.9999999)])
def test_a_list_is_read_back_as_these_very_numbers(levels):
    assert parse_levels(levels_text((*levels[::-1], levels[0]))) == levels


def test_a_list_is_as_short_as_it_can_be():
    assert levels_text([0.5, 0.0, 0.5, 0.123456789]) == "0,0.123456789,0.5"


@pytest.mark.parametrize("text", ["", "half", "0.5;0.7", "0:1", "0:1:0", "0.9:0.1:0.1", "50", "-0.1", "nan"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(UserError, match="sparsities"):
        parse_levels(text)


@pytest.mark.parametrize(
    ("level", "label"),
    [
        (0.5, "50"),
        (0.0, "0"),
        (1.0, "100"),
        (0.125, "12.5"),
        (0.07, "7"),
        (0.55, "55"),
        (0.005, "0.5"),
        (1 / 3, "33.33333333"),
    ],
)
def test_labels_are_percent(level, label):
    assert level_label(level) == label


def test_the_files_of_a_level_are_named_after_its_masks():
    paths = LevelPaths.of("out", 0.125, "semi_structured_2of4", "npz")
    assert paths.masks == Path("out/masks_sparsity12.5_semi_structured_2of4.npz")
    assert paths.masks.name.startswith(LevelPaths.prefix(0.125))
    beside = (paths.statistics, paths.histogram, paths.heatmap, paths.model, paths.smaller)
    assert [path.name for path in beside] == [
        "stats_sparsity12.5_semi_structured_2of4.json",
        "histogram_sparsity12.5_semi_structured_2of4.png",
        "heatmap_sparsity12.5_semi_structured_2of4.png",
        "model_sparsity12.5_semi_structured_2of4",
        "smaller_sparsity12.5_semi_structured_2of4",
    ]
