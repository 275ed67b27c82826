"""Entry points in this process, as ``python -m entrypoints.NAME`` runs them."""

import runpy
import sys

import pytest


@pytest.fixture(autouse=True)
def _store(made_store):
    """Every test here finds its tracking store made."""
    return made_store


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs an entry point as ``python -m entrypoints.NAME`` does; returns (exit status, stdout, stderr)."""

    def run(name, **values):
        argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"entrypoints.{name}", *argv])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(f"entrypoints.{name}", run_name="__main__")
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run
