"""Tasks against lm-eval's own loading of the same rows, by its own road."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from lm_eval.tasks import TaskManager

from sparse_ft.errors import UserError
from sparse_ft.tasks.definitions import eval_split, load_task, set_fewshot, task_protocol, write_lm_eval_task
from sparse_ft.tasks.sources import split_context

TASKS = ("boolq", "hellaswag", "gsm8k")
SHARED = Path(__file__).parents[3] / "shared" / "data"


def by_hand(name, data_dir, folder):
    """The task as lm-eval's command line builds it with ``--include_path``."""
    write_lm_eval_task(name, data_dir, folder)
    return TaskManager(include_path=folder, include_defaults=False).load([name])["tasks"][name]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_prompts_targets_and_choices_are_lm_evals(name, num_fewshot, data_dir, tmp_path):
    ours, theirs = load_task(name, data_dir, num_fewshot), by_hand(name, data_dir, tmp_path)
    for task in (ours, theirs):
        task.set_fewshot_seed(1234)
    assert len(ours.eval_docs) == len(theirs.eval_docs) > 1
    for our, their in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        contexts = [task.fewshot_context(doc, num_fewshot) for task, doc in ((ours, our), (theirs, their))]
        assert contexts[0] == contexts[1]
        assert ours.doc_to_target(our) == theirs.doc_to_target(their)
        if name != "gsm8k":
            assert ours.doc_to_choice(our) == theirs.doc_to_choice(their)


@pytest.mark.parametrize("name", TASKS)
def test_everything_but_the_rows_is_from_lm_evals_file(name, data_dir, tmp_path):
    ours, theirs = load_task(name, data_dir), by_hand(name, data_dir, tmp_path)
    assert theirs.VERSION == ours.VERSION
    for key in ("output_type", "metric_list", "filter_list", "generation_kwargs", "doc_to_text", "target_delimiter"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    assert (ours.config.num_fewshot or 0) == {"boolq": 0, "hellaswag": 0, "gsm8k": 5}[name]


def test_prompts_in_words(data_dir):
    """The texts that the field's numbers come from, spelled out once."""
    boolq = load_task("boolq", data_dir)
    doc = boolq.eval_docs[0]
    prompt = "Lamps -- They burnt oil.\nQuestion: do lamps burn oil?\nAnswer:"
    assert boolq.fewshot_context(doc, 0) == prompt and boolq.doc_to_choice(doc) == ["no", "yes"]
    assert [boolq.doc_to_target(doc) for doc in boolq.eval_docs] == [1, 0, 1]
    requests = boolq.construct_requests(doc=doc, ctx=prompt, metadata=("boolq", 0, 1))
    assert [request.args for request in requests] == [(prompt, " no"), (prompt, " yes")]

    hellaswag = load_task("hellaswag", data_dir)
    prompts = [hellaswag.fewshot_context(doc, 0) for doc in hellaswag.eval_docs]
    assert prompts[0] == "Roof repair: A man is on a roof. He pulls. The man in the usa"
    assert prompts[1] == "Food: How to cook rice. Wash it. Use cold water."
    assert hellaswag.doc_to_choice(hellaswag.eval_docs[0])[1] == " sings twice."  # lm-eval's own space

    gsm8k = load_task("gsm8k", data_dir)
    assert gsm8k.fewshot_context(gsm8k.eval_docs[0], 0) == "Question: What is 20 + 2?\nAnswer:"


@pytest.mark.parametrize(
    ("ctx_a", "ctx_b"), [("A man is on a roof. It rains.", "the man in the USA"), ("Wash it.", "")]
)
def test_hellaswag_prompt_is_the_same_with_and_without_the_published_columns(ctx_a, ctx_b, tmp_path, data_dir):
    row = {"activity_label": "X", "endings": ["a.", "b."], "label": "1"}
    joined = f"{ctx_a} {ctx_b}".strip()
    prompts = []
    for number, context in enumerate(({"ctx": joined}, {"ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": joined})):
        folder = tmp_path / str(number) / "hellaswag"
        folder.mkdir(parents=True)
        (folder / "validation.jsonl").write_text(json.dumps({**row, **context}))
        task = load_task("hellaswag", folder.parent)
        prompts.append(task.fewshot_context(task.eval_docs[0], 0))
    assert prompts[0] == prompts[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real files beside the repository")
def test_real_contexts_are_cut_before_a_lower_case_fragment():
    rows = [json.loads(line) for line in (SHARED / "hellaswag" / "validation.jsonl").open()]
    cut = [split_context(row["ctx"]) for row in rows]
    assert all(f"{a} {b}".split() == row["ctx"].split() for (a, b), row in zip(cut, rows, strict=True))
    share = sum(bool(b) for _, b in cut) / len(cut)
    # ActivityNet's share of the validation split is 3,243 of 10,042.
    assert share == pytest.approx(0.323, abs=0.03)


def test_protocol_says_what_a_score_depends_on(data_dir):
    protocol = task_protocol(load_task("gsm8k", data_dir, num_fewshot=3))
    assert json.loads(json.dumps(protocol)) == protocol
    expected = {"task": "gsm8k", "task_version": 3.0, "num_fewshot": 3, "split": "test", "split_rows": 2}
    assert expected.items() <= protocol.items()
    assert protocol["source"] == str(data_dir) and protocol["lm_eval_version"].startswith("0.4.")


def test_a_folder_without_train_scores_but_gives_no_examples(data_dir, tmp_path):
    for name, split in (("boolq", "validation"), ("gsm8k", "test")):
        shutil.copytree(data_dir / name, tmp_path / name)
        (tmp_path / name / "train.jsonl").unlink()
        task = load_task(name, tmp_path, num_fewshot=0)
        assert eval_split(task) == split and not task.has_training_docs() and len(task.eval_docs) > 1
    with pytest.raises(UserError, match=r"train\.jsonl is missing.*gives the 5 few-shot examples"):
        load_task("gsm8k", tmp_path)
    (tmp_path / "boolq" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"validation\.jsonl is missing.*is scored"):
        load_task("boolq", tmp_path)


def test_wrong_wishes_are_one_line(data_dir):
    with pytest.raises(UserError, match="between 0 and 8"):
        load_task("boolq", data_dir, num_fewshot=9)
    with pytest.raises(UserError, match="between 0 and 8"):
        set_fewshot(load_task("boolq", data_dir), -1)
    with pytest.raises(UserError, match=r"from the hub.*or give data_dir"):
        load_task("boolq", None)


@pytest.mark.slow
def test_names_outside_the_three(data_dir, tmp_path):
    """Slow: lm-eval reads all its task files to find a name."""
    with pytest.raises(UserError, match="no task 'nonesuch'"):
        load_task("nonesuch", data_dir)
    with pytest.raises(UserError, match="'mmlu' is a group"):
        load_task("mmlu", data_dir)
    (tmp_path / "piqa").mkdir()
    row = {"goal": "To open a door", "sol1": "turn the knob.", "sol2": "shout.", "label": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(row))
    task = load_task("piqa", tmp_path)
    assert task.fewshot_context(task.eval_docs[0], 0) == "Question: To open a door\nAnswer:"


def test_nothing_outside_is_touched(data_dir, capfd):
    logger = logging.getLogger("lm_eval")
    before = logger.level, datasets.are_progress_bars_disabled(), dict(os.environ)
    load_task("hellaswag", data_dir)
    assert (logger.level, datasets.are_progress_bars_disabled(), dict(os.environ)) == before
    assert capfd.readouterr() == ("", "")


def test_local_rows_need_neither_hub_nor_its_cache(data_dir, tmp_path):
    code = "import sys\nfrom sparse_ft.tasks.definitions import load_task\n"
    code += "print(len(load_task('boolq', sys.argv[1]).eval_docs))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, data_dir], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "3", done.stderr
    assert not (tmp_path / "hf").exists()
