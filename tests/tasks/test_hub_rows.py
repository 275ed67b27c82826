"""Rows from a hub get the look that rows from a file get. A process each: where the hub is, libraries read at start."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import yaml
from hub import hub_server

CHOICES = {"text": ["a", "b"], "label": ["A", "B"]}
GSM8K = [{"question": f"{n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(8)]
ARC = [{"id": str(n), "question": "1+1?", "choices": CHOICES, "answerKey": "A"} for n in range(8)]
TASKS = {
    "gsm8k": ("openai/gsm8k", "main", GSM8K, {"answer": "It is 4."}, "has no line '#### NUMBER'"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", ARC, {"answerKey": "E"}, "'E' is not in list"),
}
CODE = """
import json, sys
from sparse_ft.errors import UserError
from sparse_ft.tasks.definitions import load_task
try:
    print("read", len(load_task(sys.argv[1]).eval_docs))
except UserError as error:
    print(error)
"""


def _loaded(task, splits, folder):
    name, configuration, *_ = TASKS[task]
    repository, files = folder / "datasets" / name, []
    (repository / configuration).mkdir(parents=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(repository / configuration / f"{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"{configuration}/{split}-*"})
    card = yaml.safe_dump({"configs": [{"config_name": configuration, "data_files": files}]}, sort_keys=False)
    (repository / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with hub_server(folder) as (address, _):
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", CODE, task], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, "train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_answer_is_one_line_with_its_row(task, wrong, tmp_path):
    name, _, rows, change, message = TASKS[task]
    splits = {split: json.loads(json.dumps(rows)) for split in ("train", "validation", "test")}
    if wrong is None:
        assert _loaded(task, splits, tmp_path) == "read 8\n"
        return
    splits[wrong][2].update(change)
    told = _loaded(task, splits, tmp_path)
    assert f"{name} on the hub: {wrong}, row 2" in told and message in told and told.count("\n") == 1
