"""What the image is made of is there. Where no container engine answers, this and the lint are all that looks at it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ft.nvidia import torch_index

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STEPS = re.sub(r"\\\n\s*", "", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))


def _steps(kind):
    return re.findall(rf"^{kind} (.*)$", STEPS, re.MULTILINE)


@pytest.fixture
def context(tmp_path):
    """What a builder is sent: what .dockerignore, a list of exceptions, lets through."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    folder = tmp_path / "context"
    folder.mkdir()
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    return folder


def test_everything_that_is_copied_and_installed_from_is_sent_to_the_builder(context):
    for step in _steps("COPY"):
        *sources, _ = [word for word in shlex.split(step) if not word.startswith("--")]
        assert all((context / source).exists() for source in sources), step
    for file in re.findall(r"requirements/\S+\.txt", "".join(_steps("RUN"))):
        assert (context / file).is_file(), file
    # Metadata, version and packages are complete: what the editable install asks setuptools for.
    ask = "from setuptools import build_meta as b; import sys; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"
    words = [sys.executable, "-c", ask, str(context.parent)]
    done = subprocess.run(words, cwd=context, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    said = (context.parent / done.stdout.splitlines()[-1] / "METADATA").read_text()
    (extras,) = re.findall(r"--editable \"\.\[(.*?)\]\"", STEPS)
    assert set(extras.split(",")) <= set(re.findall(r"^Provides-Extra: (\S+)$", said, re.MULTILINE))


def test_its_torch_is_pinned_and_each_of_its_builds_is_one_that_a_driver_is_given():
    assert _steps("ARG") == ["TORCH=cpu"]
    pin = subprocess.run(["grep", "^torch==", "requirements/base.txt"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "\"$(grep '^torch==' requirements/base.txt)\"" in STEPS and re.fullmatch(r"torch==[\d.]+\n", pin)
    named = set(re.findall(r"\bcu\d{3}\b", DOCKERFILE + (ROOT / "docs/study.md").read_text()))
    given = {torch_index(cuda).rpartition("/")[2] for cuda in ((12, 0), (12, 8), (13, 0))}
    assert named == given
