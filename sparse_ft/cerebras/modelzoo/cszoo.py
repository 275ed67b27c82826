"""ModelZoo's own command line, with this project's callbacks known to it.

    python -m sparse_ft.cerebras.modelzoo.cszoo fit CONFIG.yaml [--target_device CPU] [--validate_only] ...

ModelZoo builds the schema of a YAML from the callback classes that exist at that moment, so ours must be imported
before: started by the plain ``cszoo``, a configuration that names ``SparseMask`` ends in "Input tag 'sparsemask'
does not match any of the expected tags". Everything else is ModelZoo's: commands, flags, exit status.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

__all__ = ["main"]

_EVALUATION = (
    "bigcode_eval",
    "bigcode_eval.tasks",
    "bigcode_eval.base",
    "bigcode_eval.evaluator",
    "bigcode_eval.utils",
)


class _Absent(ModuleType):
    """A package that ModelZoo imports on every start and uses only in ``cszoo bigcode_eval``."""

    ALL_TASKS: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise ImportError(f"{self.__name__}.{name}: bigcode_eval is not installed (it is not on the package index)")

        return type(name, (), {"__init__": refuse})


def stand_in_for_bigcode_eval() -> None:
    """Lets ModelZoo be imported where bigcode_eval, which it takes from GitHub, is not installed."""
    if importlib.util.find_spec("bigcode_eval") is None:
        for name in _EVALUATION:
            sys.modules[name] = module = _Absent(name)
            module.__path__ = []  # a package


stand_in_for_bigcode_eval()

import cerebras.modelzoo.cli.main  # noqa: E402

import sparse_ft.cerebras.modelzoo.callback  # noqa: E402, F401  its classes must exist before any schema is built


def main() -> None:
    """Hands over to ModelZoo, whose messages then name the same program."""
    cerebras.modelzoo.cli.main.main()


if __name__ == "__main__":
    main()
