"""What is scored beside a task: found by its names, with its rows, or refused in one line."""

import json

import pytest
from suite import write_group, write_suite

from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.parser import Parser
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import training_examples
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tasks.suite import load_suite, suite_digest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return write_group(tmp_path_factory.mktemp("groups"))


def test_groups_with_numbers_are_one_name_and_others_stand_for_their_members(data, groups):
    (whole,) = load_suite(["tiny_all"], data, groups)
    assert set(whole.tasks) == {"tiny_rivers", "tiny_seas", "tiny_trees"} and set(whole.groups) == {
        "tiny_all",
        "tiny_part",
    }
    assert [item.name for item in load_suite(["piqa", "tiny_bare"], data, groups)] == [
        "piqa", "tiny_rivers", "tiny_trees",
    ]  # fmt: skip
    assert [item.tasks["piqa"].config.num_fewshot for item in load_suite(["piqa:3"], data)] == [3]


def test_rows_and_definitions_make_the_digest(data, groups, tmp_path):
    def digest(*names, rows=data, definitions=groups):
        return suite_digest(load_suite(names, rows, definitions))

    assert digest("piqa") == digest("piqa") != digest("piqa:2") != digest("arc_easy")
    assert digest("tiny_all", definitions=write_group(tmp_path / "same")) == digest("tiny_all")
    other = write_group(tmp_path / "other")
    (other / "_all.yaml").write_text(
        (other / "_all.yaml").read_text().replace("weight_by_size: true", "weight_by_size: false")
    )
    assert digest("tiny_all", definitions=other) != digest("tiny_all")
    changed = write_suite(tmp_path / "rows")
    lines = (changed / "piqa" / "validation.jsonl").read_text().splitlines()
    (changed / "piqa" / "validation.jsonl").write_text(
        "\n".join([json.dumps(json.loads(lines[0]) | {"goal": "Swim"}), *lines[1:]])
    )
    assert digest("piqa", rows=changed) != digest("piqa")
    (changed / "piqa" / "train.jsonl").write_text(lines[0])  # which nothing is scored on
    assert digest("piqa", rows=changed) == digest("piqa", rows=changed)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["piqa", "piqa:2"], r"score has piqa twice \(score: piqa, piqa:2\); leave one out"),
        (["tiny_bare", "tiny_trees"], "score has tiny_trees twice"),
        (["social_iqa"], "cannot load the data of social_iqa from the hub .*a folder with social_iqa/"),
        (["piqa:99"], "num_fewshot is 99; piqa has 4 rows to take examples from"),
        (["copa", "sciq"], "cannot load the data of copa .* | cannot load the data of sciq"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_line(names, message, data, groups):
    with pytest.raises(UserError, match=message) as refused:
        load_suite(names, data, groups)
    assert "\n" not in str(refused.value)


def test_a_list_is_read_as_people_write_it():
    parser = Parser(CellConfig)
    listed = parser.values({"score": ["piqa", "boolq", "mmlu:5"]}, "here")
    assert listed.score == ("boolq", "mmlu:5", "piqa") == parser.values({"score": "mmlu:5, piqa,boolq"}, "here").score
    assert listed.canonical()["score"] == "boolq,mmlu:5,piqa"
    assert parser.values(listed.canonical(), "its config.yaml").key() == listed.key() != CellConfig().key()
    assert parser.values({"score": "none"}, "here").canonical() == CellConfig().canonical()
    assert "score" not in CellConfig().canonical() and "chat_template" not in CellConfig().canonical()
    for wrong in ("piqa;boolq", "piqa,", "mmlu:five", "a/b"):
        with pytest.raises(UserError, match=r"score has '.*'; list tasks and groups of lm-eval"):
            parser.values({"score": wrong}, "here")


def test_training_prompts_are_in_the_chat_template_where_scoring_is(tiny_model):
    from sparse_ft.models.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_model("tiny-llama"))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    task = load_task("boolq", made_data_dir())
    (plain,) = training_examples(task, tokenizer, 512, 1)
    (chatty,) = training_examples(task, tokenizer, 512, 1, chat=True)
    text = tokenizer.decode(chatty.input_ids, skip_special_tokens=True)
    asked = tokenizer.decode(plain.input_ids[: plain.answer_start], skip_special_tokens=True)
    assert text.startswith("<user>") and asked.strip() in text
    assert tokenizer.decode(chatty.input_ids[chatty.answer_start :]) in ("yes", "no")
