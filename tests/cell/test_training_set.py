"""What a cell is trained on: rows of one's own, known by what is in them; of a conversation the assistant's turns."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from documents import commands
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_ft import cli
from sparse_ft.cell.identity import cell_identity, cell_key, plan_identity, untuned_key
from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.register import cell_card
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.training_set import training_set
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.study.checks.preflight import check_examples
from sparse_ft.tasks.examples import training_examples
from sparse_ft.tasks.rows import MESSAGES, PROMPTS, TEXT
from sparse_ft.tracking.runs import Tracker
from sparse_ft.training.collator import AnswerCollator

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ROWS = {
    TEXT: [{"text": f"The river has {number} names."} for number in range(9)],
    PROMPTS: [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(9)],
    MESSAGES: [
        {
            "messages": [
                {"role": "user", "content": f"{number} + 1?"},
                {"role": "assistant", "content": f"{number + 1}."},
                {"role": "user", "content": "Is it true?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for number in range(9)
    ],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A tiny model that has a chat template."""
    folder = shutil.copytree(tiny_model("tiny-llama"), tmp_path_factory.mktemp("model") / "tiny-chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {shape: write(folder / f"{shape}.jsonl", rows) for shape, rows in ROWS.items()}


@pytest.fixture
def cell(model, small):
    return CellConfig(model=model, mode="dense", **small)


def test_of_the_task_it_is_what_it_always_was(cell):
    bench = Workbench()
    found = training_set(cell, bench)
    task, tokenizer = bench.task(cell), bench.tokenizer(cell.model)
    assert found.examples == training_examples(task, tokenizer, cell.max_seq_len, 4, cell.seed)
    assert found.protocol == {"data": "task", "loss_on": "the answer"}
    everything = training_set(replace(cell, loss_on="all"), bench)
    assert [e.input_ids for e in everything.examples] == [e.input_ids for e in found.examples]
    assert {e.answer_start for e in everything.examples} == {1} and everything.protocol["loss_on"] == "all tokens"
    assert {"train_data", "loss_on"}.isdisjoint(cell.canonical())


@pytest.mark.parametrize("shape", ROWS)
def test_rows_of_ones_own_train_a_cell_and_the_protocol_says_which(cell, files, shape, tmp_path):
    cell = replace(cell, train_data=files[shape])
    result = run_cell(cell, None, Workbench(), tmp_path / "cell")
    said = {name: value for name, value in result.protocol.items() if name.startswith(("train_data", "train_loss_on"))}
    learned = {TEXT: "all tokens", PROMPTS: "the completion", MESSAGES: "the assistant's turns"}[shape]
    assert said == {"train_data": files[shape], "train_data_shape": shape, "train_data_rows": 9,
                    "train_loss_on": learned}  # fmt: skip
    assert len(result.series["train/loss_curve"]) == 2 and result.metrics["train/weights_moved"] > 0


def test_the_command_of_the_page(files, tmp_path, monkeypatch, capsys):
    (command,) = (c for c in commands("docs/training_data.md") if c.words[:2] == ["sparse-ft", "train"])
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(files[PROMPTS], "rows.jsonl")
    assert cli.run("train", command.words[2:], "train") == 0, capsys.readouterr()
    (run,) = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    assert run.params["protocol/train_data_shape"] == PROMPTS and run.params["cfg/train_data"] == "rows.jsonl"


def test_the_loss_of_conversations_is_that_of_labels_made_by_hand(cell, files):
    """Two turns of the assistant in each, of unequal lengths, padded into one batch; labels from the text itself."""
    bench = Workbench()
    cell = replace(cell, train_data=files[MESSAGES])
    examples = training_set(cell, bench).examples
    model, tokenizer = AutoModelForCausalLM.from_pretrained(cell.model).eval(), bench.tokenizer(cell.model)
    total, tokens = 0.0, 0
    for example in examples:
        ids, labels = [], []
        for part in tokenizer.decode(example.input_ids).split("<s>")[1:]:
            role, _, content = part.partition("\n")
            piece = tokenizer(f"<s>{role}\n", add_special_tokens=False)["input_ids"]
            said = tokenizer(content, add_special_tokens=False)["input_ids"]
            ids += piece + said
            labels += [-100] * len(piece) + (said if role == "assistant" else [-100] * len(said))
        assert ids == example.input_ids
        logits, wanted = model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
        total += functional.cross_entropy(logits, wanted, reduction="sum").item()
        tokens += int((wanted != -100).sum())
    loss = model(**AnswerCollator(0)([vars(example) for example in examples])).loss.item()
    assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_data_is_known_by_its_rows_and_not_by_its_name(cell, files, tmp_path):
    bench, same = Workbench(), {}

    def key(**values):
        one = replace(cell, **values)
        return cell_key(one, cell_identity(one, bench))

    for shape, path in files.items():
        copy = write(tmp_path / f"copy of {shape}.jsonl", ROWS[shape])
        other = write(tmp_path / f"other {shape}.jsonl", ROWS[shape][1:])
        same[shape] = key(train_data=path)
        assert same[shape] == key(train_data=copy) != key(train_data=other)
        assert (same[shape] == key(train_data=path, loss_on="all")) == (shape == TEXT)
    assert len({*same.values(), key()}) == 4
    own = replace(cell, train_data=files[MESSAGES])
    identity = cell_identity(own, bench)
    assert {"train_data", "chat_template"} <= set(identity) and "training_data" not in identity
    assert plan_identity([own], [identity])[f"rows {files[MESSAGES]}"] == {"train_data": identity["train_data"]}
    untuned = {untuned_key(c, cell_identity(c, bench), "start", "", {}) for c in (cell, own)}
    assert len(untuned) == 1  # how a model is scored is no matter of what it is trained on next
    pruned = replace(cell, mode="pruned")
    assert replace(pruned, train_data=files[TEXT], loss_on="all").key() == pruned.key()
    assert "train_data" not in cell_identity(replace(pruned, train_data=files[TEXT]), bench)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("weight", [0.2, 0.5])
def test_a_mix_has_the_proportions_asked_for(cell, files, weight, packing):
    """Of 20 sequences; the rows of either source are known by what they begin with."""
    bench = Workbench()
    cell = replace(cell, train_data=files[PROMPTS], mix=files[TEXT], mix_weight=weight, max_steps=10, packing=packing,
                   max_seq_len=40)  # fmt: skip
    found = training_set(cell, bench)
    texts = ["The river" in bench.tokenizer(cell.model).decode(example.input_ids) for example in found.examples]
    assert (len(texts), sum(texts)) == (20, round(20 * weight)) and texts != sorted(texts)
    said = {name: value for name, value in found.protocol.items() if "mix" in name}
    assert said == {"mix": files[TEXT], "mix_shape": TEXT, "mix_rows": 9, "mix_loss_on": "all tokens",
                    "mix_sequences": f"{sum(texts)} of 20"}  # fmt: skip
    assert training_set(cell, bench) == found != training_set(replace(cell, seed=1), bench)


def test_with_epochs_a_mix_goes_beside_all_of_the_first_source(cell, files):
    cell = replace(cell, train_data=files[PROMPTS], mix=files[TEXT], mix_weight=0.25, num_epochs=2.0)
    found = training_set(cell, Workbench())
    assert len(found.examples) == 9 + 3 and found.protocol["mix_sequences"] == "3 of 12"


def test_a_mix_is_known_by_its_rows_too(cell, files, tmp_path):
    bench, copy = Workbench(), write(tmp_path / "copy.jsonl", ROWS[TEXT])

    def key(**values):
        one = replace(cell, **values)
        return cell_key(one, cell_identity(one, bench))

    mixed = {"train_data": files[PROMPTS], "mix": files[TEXT]}
    assert key(**mixed) == key(**mixed | {"mix": copy}) != key(**mixed, mix_weight=0.3)
    swapped = {"train_data": files[TEXT], "mix": files[PROMPTS]}
    assert len({key(**mixed), key(**swapped), key(**mixed, loss_on="all"), key(train_data=files[PROMPTS])}) == 4
    beside = {"train_data": "task", "mix": files[TEXT]}
    identity = cell_identity(replace(cell, **beside), bench)
    assert {"training_data", "mixed_data"} <= set(identity) and "train_data" not in identity
    assert len({key(**beside), key(**beside, loss_on="all"), key()}) == 3  # of the task's rows it says something
    plan = plan_identity([replace(cell, **beside)], [identity])
    assert plan[f"rows {files[TEXT]}"] == {"mixed_data": identity["mixed_data"]}


def test_packed_windows_and_a_mix_train_a_cell_under_a_teacher(cell, files, tmp_path):
    cell = replace(cell, train_data=files[PROMPTS], mix=files[TEXT], mix_weight=0.5, packing=True, max_seq_len=64,
                   mode="sparse_to_sparse", teacher="dense", num_epochs=1.0, schedule="cosine")  # fmt: skip
    bench = Workbench()
    found = training_set(cell, bench)
    assert found.protocol["packing_documents"] > len(found.examples) and found.protocol["packing_filled"] > 0.5
    kind = replace(mask_set_of(cell), sparsities=(cell.sparsity,))
    (masks,) = make_masks(kind, bench, tmp_path / "masks")
    result = run_cell(cell, masks, bench, tmp_path / "cell")
    assert {"train/kl", "train/squarehead"} <= set(result.series) and result.metrics["sparsity/violations"] == 0
    assert result.metrics["train/weights_moved"] > 0 and result.protocol["train_schedule"] == "cosine"
    assert result.protocol["train_max_steps"] == cell.steps_over(len(found.examples))


def test_the_tasks_rows_still_count_where_something_else_reads_them(cell, files):
    bench = Workbench()
    for values in ({"mode": "sparse_to_sparse", "importance": "wanda"}, {"mode": "full", "recover_steps": 1}):
        found = cell_identity(replace(cell, train_data=files[TEXT], **values), bench)
        assert {"training_data", "train_data"} <= set(found)


def test_a_card_says_what_was_trained_on(cell, files):
    own = replace(cell, train_data=files[TEXT], mix="task")
    hub = replace(cell, train_data="owner/name:config@main")
    title, other = (cell_card(one, CellResult(), None).split("fine-tuned on ")[1].split(", ")[0] for one in (own, hub))
    assert (title, other) == (f"{TEXT}.jsonl and boolq", "owner/name:config@main")
    told = cell_card(own, CellResult(protocol={"train_max_steps": 7}), None)
    assert "7" in next(line for line in told.splitlines() if "max_steps" in line)


def test_what_cannot_be_trained_on_is_said_before_a_model_is_loaded(cell, files, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("sparse_ft.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    long = write(tmp_path / "long.jsonl", [*ROWS[TEXT], {"text": "The river. " * 500}])
    cell = replace(cell, max_steps=100)
    plain = str(tiny_model("tiny-llama"))
    for values, said in (
        ({"train_data": long}, r"long\.jsonl:10 has \d+ tokens, max_seq_len is 512"),
        (
            {"train_data": files[MESSAGES], "model": plain},
            r"messages\.jsonl:\d: messages need a chat",
        ),
    ):
        with pytest.raises(UserError, match=said):
            check_examples(replace(cell, **values), Workbench())
    for values, said in (
        ({"train_data": "nowhere.jsonl"}, "train_data is 'nowhere.jsonl'; there is no such file"),
        ({"mix": "nowhere.jsonl"}, "mix is 'nowhere.jsonl'; there is no such file"),
        ({"mix": "task", "mix_weight": 1.0}, "mix_weight is 1.0; it must lie between 0 and 1"),
        ({"loss_on": "nothing"}, "loss_on 'nothing' is none of answer, all"),
    ):
        with pytest.raises(UserError, match=said):
            replace(cell, **values).check()
