"""Each "How to add" of CONTRIBUTING.md, done as it is written there."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from documents import FENCE, ROOT, section

from sparse_ft.cli import run
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tracking.runs import Tracker

pytestmark = pytest.mark.usefixtures("made_store")
SMALL = ["--model", "tiny-llama", "--max_steps", "1", "--batch_size", "2", "--lora_r", "2", "--perplexity_tokens", "0",
         "--eval_limit", "4"]  # fmt: skip
STARTED = "import sys; from sparse_ft.cli import main; sys.exit(main())"


def _blocks(heading, language):
    return [body for found, body in FENCE.findall(section("CONTRIBUTING.md", heading)) if found == language]


def _cells():
    return [run for run in Tracker().search() if run.tags.get("kind") == "cell"]


@pytest.fixture
def weather(tmp_path, monkeypatch):
    """The task's YAML and rows, as the page has them; the working directory is the one they are in."""
    monkeypatch.chdir(tmp_path)
    (definition,) = _blocks("How to add a task", "yaml")
    (tmp_path / "mytasks").mkdir()
    (tmp_path / "mytasks" / "weather.yaml").write_text(definition)
    row = json.loads(re.search(r"`(\{.question.*?\})`", section("CONTRIBUTING.md", "How to add a task"))[1])
    for split in ("train", "validation"):
        path = tmp_path / "rows" / "weather" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row | {"question": f"{n}. {row['question']}"}) + "\n" for n in range(4)))
    return tmp_path / "mytasks" / "weather.yaml"


@pytest.mark.slow
def test_a_task_of_ones_own(weather):
    (command,) = _blocks("How to add a task", "")
    _, _, *options = command.split()
    for _ in range(2):
        assert run("train", [*options, *SMALL], "train") == 0
        weather.write_text(weather.read_text().replace("Answer:", "It is"))  # another prompt is another task
    first, second = sorted(_cells(), key=lambda run: run.start_time)
    assert first.params["protocol/task"] == "weather" and first.params["cfg/include_path"] == "mytasks"
    assert first.metrics.keys() >= {"eval/acc", "eval/loss"}
    differ = {name for name in first.params if first.params[name] != second.params[name]}
    assert "identity/task_definition" in differ and not [name for name in differ if name.startswith("cfg/")]
    assert first.tags["cell_key"] != second.tags["cell_key"]


@pytest.mark.slow
def test_a_study_takes_the_task_from_its_folder_and_others_from_lm_eval(weather, study_file, tmp_path):
    rows = [{"id": str(n), "question": "Is snow cold?", "choices": {"text": ["no", "yes"], "label": ["A", "B"]},
             "answerKey": "B"} for n in range(4)]  # fmt: skip
    (tmp_path / "rows" / "arc_easy").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows/arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = {"model": ["tiny-llama"], "task": ["weather", "arc_easy"], "mode": ["dense"]}
    path = study_file(grid, cell={"data_dir": "rows", "include_path": "mytasks", "perplexity_tokens": 0})
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    assert {run.params["protocol/task"] for run in _cells()} == {"weather", "arc_easy"}
    told = [run.params.get("identity/task_definition") for run in _cells()]
    assert told.count(None) == 1  # lm-eval's own is told by lm-eval's version


def test_a_definition_may_name_its_own_rows(weather):
    named = weather.read_text().replace(
        "dataset_path: json",
        "dataset_path: json\ndataset_kwargs: {data_files: {train: rows/weather/train.jsonl, "
        "validation: rows/weather/validation.jsonl}}",
    )
    weather.write_text(named)
    task = load_task("weather", include_path="mytasks")
    assert len(task.eval_docs) == 4 and task.config.metadata["source"] == "hub:json"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "message"), [
    ("weather", "nowhere", "include_path nowhere is not a folder"),
    ("whether", "mytasks", "has no task 'whether', nor has mytasks"),
])  # fmt: skip
def test_a_task_that_is_not_there(weather, name, folder, message):
    with pytest.raises(UserError, match=message):
        load_task(name, "rows", include_path=folder)


@pytest.fixture
def edited(tmp_path):
    """Runs `sparse-ft WORDS` on a copy of the package in which a line was replaced by what a page says."""

    def start(file, line, block, *words):
        shutil.copytree(ROOT / "sparse_ft", tmp_path / "sparse_ft", ignore=shutil.ignore_patterns("__pycache__"),
                        dirs_exist_ok=True)  # fmt: skip
        path = tmp_path / file
        text = path.read_text(encoding="utf-8")
        (old,) = re.findall(rf"^{re.escape(line)}.*\n", text, re.MULTILINE)
        path.write_text(text.replace(old, block), encoding="utf-8")
        return subprocess.run([sys.executable, "-c", STARTED, *words], cwd=tmp_path, text=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip

    return start


@pytest.mark.slow
def test_a_mode(edited):
    (row,) = _blocks("How to add a mode", "python")
    done = edited("sparse_ft/settings/modes.py", "MODES = ", row, "train", "--mode", "full_dense", "--data_dir", "made",
                  *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "full fine-tuning, dense" in done.stdout
    (cell,) = _cells()
    assert cell.params["cfg/mode"] == "full_dense" and cell.metrics["sparsity/after_merge"] < 0.01


@pytest.mark.slow
def test_an_executor(edited, study_file, tmp_path):
    module, row = _blocks("How to add an executor", "python")
    new = tmp_path / "sparse_ft" / "study" / "executors" / "thread.py"
    new.parent.mkdir(parents=True)
    new.write_text(module)
    path = study_file({"model": ["tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_dense"]}, dense_baseline=False)
    done = edited("sparse_ft/settings/executors.py", "EXECUTORS = ", row, "sweep", "--config", str(path), "--executor",
                  "thread", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [run.status for run in _cells()] == ["FINISHED"]
