"""The address of a study's cells in a browser."""

import pytest

from sparse_ft.tracking.views import _without_login


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://team:pa%40ss@host:5000/mlflow", "https://host:5000/mlflow"),
        ("http://user@host:5000", "http://host:5000"),
        ("http://host", "http://host"),
    ],
)
def test_no_password_is_in_the_address(given, shown):
    assert _without_login(given) == shown
