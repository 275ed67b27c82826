import math

import pytest

from sparse_ft.analysis.numbers import shown, shown_with_error


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(31.46, ",.4g", "31.46"), (62515.4, ",.4g", "62,515"), (0.98, ".3f", "0.980"), (math.inf, ",.4g", "∞"),
     (math.nan, ".3f", "–"), (None, ".3f", "–")],
)  # fmt: skip
def test_numbers(value, form, text):
    assert shown(value, form) == text


@pytest.mark.parametrize(
    ("value", "error", "form", "text"),
    [(9.0012, 0.4501, ",.4g", "9.001 ± 0.45"), (440.25, 1234.5, ",.4g", "440.2 ± 1,234"),
     (0.625, 0.0141, ".3f", "0.625 ± 0.014"), (0.625, math.nan, ".3f", "0.625"), (math.nan, 0.1, ".3f", "–"),
     (math.inf, math.inf, ",.4g", "∞"), (317274.0, 45123.0, ",.4g", "317,274 ± 45,123")],
)  # fmt: skip
def test_numbers_with_their_errors(value, error, form, text):
    assert shown_with_error(value, error, form) == text
