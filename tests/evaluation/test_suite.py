"""Tasks scored beside another: against lm-eval run by hand on the saved checkpoint, to the last digit."""

import math
import shutil
from dataclasses import replace

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from suite import NAMES, SUBJECTS, write_group, write_suite

from sparse_ft.errors import UserError
from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.definitions import load_task, write_lm_eval_task
from sparse_ft.tasks.finding import quiet
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tasks.suite import load_suite

SMALL = ScoringSettings(eval_limit=3, eval_batch_size=2, perplexity_tokens=0)


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("tiny-llama")


@pytest.fixture(scope="module")
def parts(folder):
    return load_model(folder, "float32", "cpu"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of all names, and of the tasks that come with the package."""
    folder = write_suite(tmp_path_factory.mktemp("suite"))
    for name in ("boolq", "hellaswag"):
        shutil.copytree(made_data_dir() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return write_group(tmp_path_factory.mktemp("groups"))


def by_hand(model_folder, names, definitions, shots=None, **rest):
    with quiet():
        return lm_eval.simple_evaluate(
            "hf",
            f"pretrained={model_folder},dtype=float32",
            names,
            num_fewshot=shots,
            batch_size=2,
            device="cpu",
            limit=SMALL.eval_limit,
            task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
            **rest,
        )


def numbers(results):
    """lm-eval's own, by the names that ours have."""
    pairs = ((key.partition(","), value) for key, value in results.items() if isinstance(value, float))
    return {name: value for (name, comma, _), value in pairs if comma}


def test_every_task_and_the_mean_are_those_of_lm_eval(parts, folder, data, tmp_path):
    names = sorted(["boolq", "hellaswag", *NAMES])
    for name in names:
        write_lm_eval_task(name, data, tmp_path)
    wanted = by_hand(folder, names, tmp_path)["results"]
    found = evaluate(*parts, load_task("boolq", data), SMALL, suite=load_suite(names, data))
    for name in names:
        for metric, value in numbers(wanted[name]).items():
            assert found.metrics[f"{name}/{metric}"] == value, (name, metric)
        # acc, as the papers do, and not the trained task's own metric.
        assert found.metrics[f"{name}/accuracy"] == wanted[name]["acc,none"]
        assert "accuracy_metric=acc; " in found.protocol["score"][name]
        assert found.protocol["score_source"][name] == str(data)
    assert found.metrics["mean_accuracy"] == math.fsum(w["acc,none"] for w in wanted.values()) / len(names)
    errors = [w["acc_stderr,none"] for w in wanted.values()]
    assert found.metrics["mean_accuracy_stderr"] == pytest.approx(math.hypot(*errors) / len(names))
    assert found.protocol["mean_accuracy_of"].startswith("arc_challenge acc, arc_easy acc, boolq acc, ")
    # The task itself is as if it had been scored alone.
    alone = evaluate(*parts, load_task("boolq", data), SMALL)
    same = {name: value for name, value in found.metrics.items() if name in alone.metrics}
    assert {**same, "samples_per_second": 0} == {**alone.metrics, "samples_per_second": 0}
    assert alone.protocol.items() <= found.protocol.items() and alone.suite is None


def test_tasks_beside_may_have_more_questions_than_the_task_itself(parts, data):
    task = load_task("boolq", data)
    names = ("boolq", "piqa")
    found = evaluate(*parts, task, replace(SMALL, score=names, score_limit=4), suite=load_suite(names, data))
    more = evaluate(*parts, task, replace(SMALL, eval_limit=4), suite=load_suite(["piqa"], data))
    assert found.metrics["boolq/acc_stderr"] == more.metrics["acc_stderr"]
    assert found.metrics["piqa/acc_stderr"] == more.metrics["piqa/acc_stderr"]
    assert found.protocol["limit"] == 3
    assert all("limit=4; samples=4; " in found.protocol["score"][name] for name in names)
    with pytest.raises(UserError, match="score_limit is 4, and score is none"):
        replace(SMALL, score_limit=4).check()


def test_a_group_is_that_of_lm_eval_with_examples_in_its_prompts(parts, folder, data, groups, tmp_path):
    suite = load_suite(["tiny_all:5"], data, groups)
    found = evaluate(*parts, load_task("boolq", data), replace(SMALL, keep_samples=True), suite=suite)
    theirs = by_hand(folder, ["tiny_all"], write_group(tmp_path / "theirs", data), shots=5)
    for metric, value in numbers(theirs["results"]["tiny_all"]).items():
        assert found.metrics[f"tiny_all/{metric}"] == value, metric
    assert found.metrics["tiny_all/accuracy"] == theirs["groups"]["tiny_all"]["acc,none"]
    assert {name for name in found.metrics if name.startswith("tiny_")} == {
        f"tiny_all/{metric}" for metric in ("acc", "acc_stderr", "accuracy", "accuracy_stderr")
    }
    # What is in the group is kept beside.
    assert set(found.suite.members) == {f"tiny_{subject}" for subject in SUBJECTS}
    for name, metrics in found.suite.members.items():
        assert metrics == numbers(theirs["results"][name])
        assert [s["arguments"] for s in found.suite.samples[name]] == [s["arguments"] for s in theirs["samples"][name]]
    said = found.protocol["score"]["tiny_all"]
    for part in ("num_fewshot=5", "task_version=2", "split=test", "limit=3", "samples=8", "chance=0.25", "tasks=3"):
        assert f"{part};" in f"{said};"
    assert found.suite.samples["tiny_seas"][0]["arguments"][0][0].count("Answer:") == 6


def test_a_chat_template_is_applied_as_lm_eval_does(parts, data, groups, tmp_path, folder):
    """With examples as turns of their own; in the loss on the answers too."""
    model, _ = parts
    chatty = tmp_path / "chatty"
    shutil.copytree(folder, chatty)
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}"
    )
    tokenizer.save_pretrained(chatty)
    settings = replace(SMALL, chat_template=True, keep_samples=True)
    found = evaluate(
        model, tokenizer, load_task("boolq", data), settings, suite=load_suite(["tiny_all:2"], data, groups)
    )
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    theirs = by_hand(chatty, ["tiny_all"], write_group(tmp_path / "theirs", data), shots=2, **chat)
    for metric, value in numbers(theirs["results"]["tiny_all"]).items():
        assert found.metrics[f"tiny_all/{metric}"] == value, metric
    for name in found.suite.members:
        assert [s["arguments"] for s in found.suite.samples[name]] == [s["arguments"] for s in theirs["samples"][name]]
    prompt, answer = found.suite.samples["tiny_seas"][0]["arguments"][0]
    assert prompt.count("<user>") == 3 and prompt.endswith("<assistant>") and answer == "A"
    write_lm_eval_task("boolq", data, tmp_path / "boolq")
    own = by_hand(chatty, ["boolq"], tmp_path / "boolq", **chat)
    assert found.metrics["acc"] == own["results"]["boolq"]["acc,none"]
    assert found.samples[0]["arguments"][0][0].startswith("<user>")
    assert [s["arguments"] for s in found.samples] == [s["arguments"] for s in own["samples"]["boolq"]]
    assert len(found.protocol["chat_template"]) == 16


def test_without_a_chat_template_there_is_one_line(parts, data):
    with pytest.raises(UserError, match="has no chat template; take the model's instruct version"):
        evaluate(*parts, load_task("boolq", data), replace(SMALL, chat_template=True))
