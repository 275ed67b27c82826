"""Public names of a package whose modules load when a name is first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

__all__ = ["public"]


def public(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` for the ``__init__.py`` of a package (PEP 562).

    Args:
        package: its ``__name__``.
        names: public name -> ``module``, or ``module:name`` of something that has another name there. No name may be
            that of a submodule, which becomes an attribute of the package when it is imported.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        return resolve_name(f"{module}:{attribute or name}")

    return getattr_, lambda: sorted(names), sorted(names)
