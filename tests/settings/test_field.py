import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import sparse_ft.settings
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig, SweepConfig
from sparse_ft.settings.field import Settings, defaults, named, part_of, plain_values, setting
from sparse_ft.settings.parser import Parser

FOLDER = Path(sparse_ft.settings.__file__).parent


@dataclass(frozen=True)
class Left(Settings):
    """One part."""

    steps: int = setting(3, "how many.", least=1)
    word: str | None = setting("one", "which.", choices=("one", "two"), result=False)


@dataclass(frozen=True)
class Right(Settings):
    """Another part."""

    share: float = setting(0.5, "how much.", least=0, most=1)
    size: int | None = setting(None, "how big.", least=1, flag=False)

    def problems(self):
        yield from super().problems()
        if self.share == 0.25:
            yield "share is a quarter."


@dataclass(frozen=True)
class Whole(Right, Left):
    """Both."""


def test_a_whole_has_the_fields_and_the_problems_of_its_parts():
    assert [entry.name for entry in fields(Whole)] == ["steps", "word", "share", "size"]
    with pytest.raises(UserError) as raised:
        Whole(steps=0, word="three", share=0.25, size=0).check()
    assert str(raised.value) == (
        "steps is 0; it must be at least 1. word 'three' is none of one, two. size is 0; it must be at least 1. "
        "share is a quarter."
    )
    with pytest.raises(UserError, match="share is nan; it must lie between 0 and 1"):
        Whole(share=float("nan")).check()
    Whole(word=None).check()


def test_marks_parts_and_plain_values():
    whole = Whole(steps=5, word=None)
    assert named(Whole, result=False) == ("word",)
    assert named(Whole, result=True, flag=True) == ("steps", "share")
    assert part_of(Left, whole) == {"steps": 5, "word": None}
    assert defaults(Left) == {"steps": 3, "word": "one"}
    assert plain_values(whole) == {"steps": 5, "word": "none", "share": 0.5}


@pytest.mark.parametrize("kind", [CellConfig, MaskConfig])
def test_plain_values_are_read_back_as_they_were(kind):
    values = {"dtype": "float32", "target_modules": "q_proj,v_proj", "sparsities": "0:0.9:0.1", "method": "random"}
    values |= {"scope": "none", "data_dir": "./none"}
    known = {entry.name for entry in fields(kind)}
    settings = Parser(kind).values({name: value for name, value in values.items() if name in known}, "one")
    assert settings.scope is None and settings.data_dir == "./none"
    assert Parser(kind).values(plain_values(settings), "again") == settings
    assert Parser(kind).arguments([f"--{name}={value}" for name, value in plain_values(settings).items()]) == settings


def test_the_defaults_make_sense():
    for kind in (CellConfig, MaskConfig):
        kind().check()
    SweepConfig("study.yaml").check()


def test_the_settings_import_neither_torch_nor_numpy():
    modules = [f"sparse_ft.settings.{path.stem}" for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}\nprint(sorted({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) >= 10 and done.stdout.strip() == "[]"
