"""Every test here finds its tracking store made."""

import pytest


@pytest.fixture(autouse=True)
def _store(made_store):
    return made_store
