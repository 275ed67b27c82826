"""What the documentation says, taken apart: links, anchors, commands, headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "console")
# What a shell says to itself, and the commands of a cluster: nothing of this project's to be checked in them.
SHELL_WORDS = {
    ".",
    "cd",
    "export",
    "head=$(scontrol",
    "others=$((SLURM_NNODES",
    "srun",
    "sleep",
    "driver=$!",
    "trap",
    "wait",
    "ray",
}


@dataclass(frozen=True)
class Command:
    """A command of a page, as words; ``block`` False where it stands in running text."""

    page: str
    text: str
    block: bool

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        return words[: words.index("&")] if "&" in words else words


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", text(page))


def blocks(page: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text(page)) if language in languages]


def commands(page: str) -> list[Command]:
    """Commands of the page: lines of its blocks, and code in the text that begins as a command does."""
    found = []
    for body in blocks(page, *SHELL):
        if not re.search(r"^(mlflow|sparse-ft|python|make|\. |export|#!/bin/bash)", body, re.MULTILINE):
            continue  # a table, a listing
        lines = (line.strip() for line in body.replace("\\\n", " ").splitlines())
        found += [Command(page, line, True) for line in lines if line and not line.startswith("#")]
    inline = re.findall(r"`([^`]+)`", prose(page))
    begin = re.compile(r"(mlflow|sparse-ft|python -m|python benchmarks/\S+|make|conda|pip install|lm_eval) [^|]")
    found += [Command(page, " ".join(code.split()), False) for code in inline if begin.match(code)]
    return found


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return text(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def links(page: str) -> list[str]:
    """Targets of links and pictures that are no web addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [target for target in found if not re.match(r"https?://", target)]


def headings(page: str, level: int | None = None) -> list[str]:
    marks = "#+" if level is None else "#" * level
    return re.findall(rf"^{marks} (.+)$", prose(page), re.MULTILINE)


def anchors(page: str) -> set[str]:
    """As Python-Markdown makes them, and GitHub too for what these pages have."""
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings(page))
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}
