"""The documentation holds: its links lead somewhere, its commands exist and run, its messages are the program's."""

import ast
import importlib
import io
import json
import re
import runpy
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from itertools import pairwise

import pytest
import yaml
from documents import PAGES, ROOT, SHELL_WORDS, Command, anchors, blocks, commands, headings, links

from sparse_ft import cli
from sparse_ft.settings.parser import Parser
from sparse_ft.study.study_file import load_study
from sparse_ft.tracking.runs import Tracker

MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
STEPS = {name: command.parameters for name, command in cli.COMMANDS.items()}
COMMANDS = [command for page in PAGES for command in commands(page)]
NOT_OURS = {  # headings of the troubleshooting page that pip, the shell or a reader says
    "No matching distribution found for torch",
    "pyenv: python: command not found",
    "Accuracy does not move with sparsity",
    "The compare page draws points, not curves",
}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), f"{page}: {target}"


def test_a_broken_link_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("documents.ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# One two: three\n[x](b.md#c) ![y](z.png) [w](https://w.org)\n```\n[no](n)\n```\n")
    assert links("a.md") == ["b.md#c", "z.png"] and anchors("a.md") == {"one-two-three"}


def test_every_page_is_in_the_site_and_every_part_of_the_issue_in_its_menu():
    pages = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in pages) == [page for page in PAGES if page.startswith("docs/")]
    topics = ("getting_started", "design", "pruning", "sparse_lora", "study", "results", "cerebras", "benchmarks",
              "troubleshooting", "api/masks")  # fmt: skip
    assert {f"{topic}.md" for topic in topics} <= set(pages)


def test_the_site_has_its_own_pinned_environment():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    lines = [line for line in (ROOT / "requirements/docs.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    assert {re.match(r"[\w-]+", name)[0] for name in wanted} <= pinned
    assert "make docs" in (ROOT / ".ci/run").read_text()


def test_commands_are_found():
    """So that a change of the pages' form does not empty the tests below."""
    assert len(COMMANDS) > 40
    assert {command.page for command in COMMANDS} >= {"README.md", "docs/getting_started.md", "docs/study.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_a_command_exists_with_all_its_options(command):
    check(command)


@pytest.mark.parametrize("wrong", [
    "mlflow run . -e nothing", "mlflow run . -e train -P no_such_field=1", "mlflow run . -e train -P max_steps=many",
    "sparse-ft train --no_such_field 1", "sparse-ft validate --checkpoint X", "sparse-ft nothing",
    "python -m benchmarks.masks --no-such-option", "make nothing", "mlflow ui --no-such-option 1", "rm -rf /",
    "pip install 'sparse_ft[nothing]'", "sparse-ft sweep --config configs/none.yaml",
])  # fmt: skip
def test_a_wrong_command_would_be_seen(wrong):
    with pytest.raises((AssertionError, SystemExit, Exception)):
        check(Command("README.md", wrong, True))


def check(command: Command) -> None:
    """Fails unless the command exists with every option it is given, by the program's own parser."""
    words = command.words
    if not words or (command.block and words[0] in SHELL_WORDS):
        return
    for word in words:
        match = re.search(r"(configs/[\w.]+\.yaml|requirements/\S+|conda\S*\.yaml)", word)
        assert match is None or (ROOT / match[1]).is_file(), f"{match and match[1]} is not there"
    match words:
        case ["make", *targets]:
            made = [target for target in targets if "=" not in target]
            subprocess.run(["make", "--dry-run", "--always-make", *made, "MODELZOO=X"], cwd=ROOT, check=True,
                           capture_output=True)  # fmt: skip
        case ["mlflow", "run", ".", *options]:
            parsed(options)
        case ["mlflow", name, *options]:
            known_by_mlflow(name, options)
        case ["sparse-ft", "--help" | "--version"]:
            pass  # tests/test_cli.py runs them
        case ["sparse-ft", step, *options]:
            if options and options != ["--help"] and step in STEPS:
                Parser(STEPS[step]).arguments(options)
            assert step in STEPS or step == "NAME"
        case ["python", "-m", "lm_eval" as program, *options] | ["python", "-m" | "-u", program, *options]:
            assert_flags(program, options)
        case ["python", "convert_hf_to_gguf.py", *_]:
            pass  # llama.cpp's own script
        case ["python", file, *options] if file.endswith(".py"):
            assert (ROOT / file).is_file()
            assert_flags(file.removesuffix(".py").replace("/", "."), options)
        case ["lm_eval", *options]:
            assert_flags("lm_eval", options)
        case ["pip", "install", *names]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for extra in re.findall(r"\[(\w+)\]", " ".join(names)):
                assert extra in extras
        case ["conda", "env", "create", "--file", _]:
            pass  # that the file is there was seen above
        case ["conda", "activate", name]:
            assert any(yaml.safe_load(file.read_text())["name"] == name for file in ROOT.glob("conda*.yaml"))
        case _:
            raise AssertionError(f"{command.page}: no rule for {command.text!r}")


def parsed(options: list[str]) -> list[str]:
    """The command line of an entry point that ``mlflow run . OPTIONS`` starts; every parameter by its parser."""
    step = options[options.index("-e") + 1] if "-e" in options else "main"
    given = dict(option.split("=", 1) for flag, option in pairwise(options) if flag == "-P")
    known = {"-e", "-P", "--env-manager"}
    assert {option for option in options if option.startswith("-")} <= known
    entry = MLPROJECT[step]
    values = {name: about.get("default") for name, about in entry.get("parameters", {}).items()} | given
    argv = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
    name = re.match(r"python -m entrypoints\.(\w+)", entry["command"])[1]
    Parser(STEPS[name]).arguments(argv)
    return [name, *argv]


def known_by_mlflow(name: str, options: list[str]) -> None:
    from mlflow.cli import cli

    group = cli.commands[name]
    if hasattr(group, "commands") and options:
        group, options = group.commands[options[0]], options[1:]
    flags = {flag for parameter in group.params for flag in parameter.opts}
    assert {option.split("=")[0] for option in options if option.startswith("-")} <= flags


@cache
def usage(module: str) -> str:
    """What a module's --help shows, in this process: in ones of their own they would all load torch anew."""
    shown, words = io.StringIO(), [module, *(["run"] if module == "lm_eval" else []), "--help"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", words)
        patch.chdir(ROOT)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    return shown.getvalue()


def assert_flags(module: str, options: list[str]) -> None:
    if module == "sparse_ft.cerebras.modelzoo.cszoo":  # ModelZoo's own parser, in an environment of its own
        assert (ROOT / "sparse_ft/cerebras/modelzoo/cszoo.py").is_file()
        return
    known = usage(module)
    for option in options:
        if re.match(r"--\w", option):
            assert re.search(rf"{re.escape(option.split('=')[0])}\b", known), f"{module} has no {option}"


RUN_HERE = [
    command
    for command in COMMANDS
    if command.page == "docs/getting_started.md" and command.block and command.words[0] in ("mlflow", "sparse-ft")
    if "GIT_URL" not in command.words  # what MLflow fetches
]


@pytest.mark.slow
def test_the_first_steps_run_as_they_are_written(monkeypatch, tmp_path, capsys):
    """Every entry point that `getting_started.md` starts, in its order, in this process and a folder of its own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sparse_ft")
    started = []
    for command in RUN_HERE:
        words = command.words
        name, *argv = parsed(words[3:]) if words[0] == "mlflow" else words[1:]
        assert cli.run(name, argv, name) == 0, (command.text, capsys.readouterr())
        started.append(name)
    assert started == ["compute_masks", "train", "train", "validate", "sweep", "sweep", "analyze"]
    assert "0 violations" in capsys.readouterr().out
    report = (tmp_path / "outputs/analysis/report.html").read_text(encoding="utf-8")
    assert "Published numbers" in report and "BoolQ on tiny-llama" in report


def test_our_commands_log_into_a_run_of_your_own(made_store, tmp_path, monkeypatch):
    (body,) = blocks("docs/results.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(body, "docs/results.md", "exec"), {})
    (run,) = Tracker.reading("Default").search()
    assert (run.name, run.status, run.tags["kind"]) == ("masks for the appendix", "FINISHED", "masks")
    assert run.params["asked_by"] == "reviewer 2" and run.metrics["mine/score"] == 1.0
    assert run.metrics["sparsity/achieved"] == 0.7


@pytest.mark.parametrize("page", PAGES)
def test_python_and_yaml_blocks_are_of_this_project(page, tmp_path):
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("sparse_ft"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name)
    for body in (body for body in blocks(page, "yaml") if not body.startswith("task:")):  # a task's definition
        (tmp_path / "study.yaml").write_text(body, encoding="utf-8")
        load_study(tmp_path / "study.yaml")


@pytest.mark.slow
def test_messages_of_the_troubleshooting_page_are_the_programs():
    said = "\n".join(messages())
    missing = []
    for heading in set(headings("docs/troubleshooting.md", 3)) - NOT_OURS:
        parts = [re.escape(part) for part in heading.split("…")]
        if not re.search("[^\n]*?".join(parts), said):
            missing.append(heading)
    assert not missing
    assert set(headings("docs/troubleshooting.md", 3)) > NOT_OURS


@cache
def messages() -> list[str]:
    """Every string of the program, with … where it puts a value in."""
    found = []
    for file in sorted((ROOT / "sparse_ft").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("\n", " ") for text in found]


@pytest.mark.usefixtures("made_store")
def test_metrics_that_the_design_names_are_logged(tmp_path):
    """By a real cell: the table of docs/design.md against its run."""
    from sparse_ft.tracking.runs import Tracker

    argv = ["--model", "tiny-llama", "--data_dir", "made", "--max_steps", "4", "--batch_size", "2", "--eval_limit", "4",
            "--perplexity_tokens", "64", "--perplexity_seq_len", "16", "--mode", "sparse_to_dense",
            "--score", "boolq", "--output_dir", str(tmp_path / "cell")]  # fmt: skip
    assert cli.run("train", argv, "train") == 0
    (run,) = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    table = (ROOT / "docs/design.md").read_text().split("| metric of a run")[1].split("\n\n")[0]
    named = re.findall(r"`([\w/.]+)`", table)
    assert len(named) > 15
    logged = "\n".join(run.metrics)
    elsewhere = {"eval/acc_norm", "eval/exact_match_strict_match"}  # of the other tasks
    patterns = {
        name: re.escape(name).replace(r"\.\.\.", r"\w+").replace("TASK", r"\w+")
        for name in set(named) - elsewhere
        if "/" in name
    }
    absent = [name for name, pattern in patterns.items() if not re.search(pattern, logged)]
    assert absent == ["protocol/perplexity_..."]
    assert json.loads(json.dumps(run.params))["protocol/perplexity_seq_len"] == "16"


def test_fields_that_pages_name_exist():
    """``name=value`` in the text of a page: a field of a step, or of the evaluation."""
    known = {entry.name for kind in STEPS.values() for entry in fields(kind)}
    for page in ("docs/troubleshooting.md", "docs/design.md", "docs/getting_started.md"):
        for name in re.findall(r"`(\w+)=[^`]*`", (ROOT / page).read_text()):
            assert name in known, f"{page}: {name}"


def test_docstrings_describe_parameters_that_are_there():
    """The site is built in strict mode, which this foretells without building it."""
    wrong = []
    for path in sorted((ROOT / "sparse_ft").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                args = function.args
                listed = (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg)
                lines = (ast.get_docstring(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0].splitlines()
                said = {m[1].lstrip("*") for line in lines if (m := re.match(r" {4}(\S[^:]*):", line))}
                wrong += [(path.name, function.name, name) for name in said - {arg.arg for arg in listed if arg}]
    assert not wrong
