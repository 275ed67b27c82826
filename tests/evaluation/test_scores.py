"""Scores against lm-eval run by hand on the saved checkpoint, and against plain torch."""

import json
import logging
import math
import random
from dataclasses import replace
from functools import cache

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from sparse_ft.errors import UserError
from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.evaluation.standard_errors import ratio_standard_error
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.progress import Progress
from sparse_ft.tasks.definitions import load_task, write_lm_eval_task
from sparse_ft.tasks.examples import gold_continuation, training_examples
from sparse_ft.tasks.finding import quiet
from sparse_ft.tasks.made import made_data_dir

SMALL = ScoringSettings(eval_limit=12, eval_batch_size=4, perplexity_tokens=0, keep_samples=True)
TASKS = ("boolq", "hellaswag", "gsm8k")


class Recorder(Progress):
    """Remembers the stages and how far they came."""

    def __init__(self):
        self.stages = []

    def start(self, stage, total, unit=""):
        self.stages.append([stage, total, 0])

    def advance(self, amount=1, note=""):
        self.stages[-1][2] += amount


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("tiny-llama")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, "float32", "cpu")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tasks():
    shots = {"gsm8k": 1}
    return {name: load_task(name, made_data_dir(), shots.get(name)) for name in TASKS}


def short(settings, name):
    """Generation is slow: fewer questions of it."""
    return replace(settings, eval_limit=2) if name == "gsm8k" else settings


@pytest.fixture(scope="module")
def scored(model, tokenizer, tasks):
    """What is found of a task under `SMALL`, computed once."""
    return cache(lambda name: evaluate(model, tokenizer, tasks[name], short(SMALL, name)))


@pytest.mark.parametrize("name", TASKS)
def test_equal_to_lm_eval_by_hand(name, tasks, scored, folder, tmp_path):
    write_lm_eval_task(name, made_data_dir(), tmp_path)
    settings = short(SMALL, name)
    with quiet():
        theirs = lm_eval.simple_evaluate(
            "hf",
            f"pretrained={folder},dtype=float32",
            [name],
            num_fewshot=tasks[name].config.num_fewshot or None,
            batch_size=4,
            device="cpu",
            limit=settings.eval_limit,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )
    ours = scored(name)
    numbers = {key: value for key, value in theirs["results"][name].items() if key.partition(",")[1]}
    for key, value in numbers.items():
        metric, _, filtering = key.partition(",")
        plain = metric.removesuffix("_stderr") + ("" if filtering == "none" else f"_{filtering.replace('-', '_')}")
        plain += "_stderr" if metric.endswith("_stderr") else ""
        assert ours.metrics[plain] == value, key
    assert theirs["versions"][name] == ours.protocol["task_version"]
    for our, their in zip(ours.samples, theirs["samples"][name], strict=True):
        assert our["arguments"] == their["arguments"] and our["doc_id"] == their["doc_id"]
        if name == "gsm8k":
            assert our["resps"] == their["resps"]
        else:
            # Equal bits where this was tried; another CPU's matrix product may sum in another order.
            found, wanted = ([response[0] for response in sample["filtered_resps"]] for sample in (our, their))
            assert found == pytest.approx(wanted, rel=1e-5)
            assert [r[1] for r in our["filtered_resps"]] == [r[1] for r in their["filtered_resps"]]


@pytest.mark.parametrize("name", TASKS)
def test_loss_is_the_mean_over_answer_tokens(name, model, tokenizer, tasks, scored):
    """Against one forward pass per question, without lm-eval's batching."""
    task, result = tasks[name], scored(name)
    task.set_fewshot_seed(1234)
    losses = []
    for number in range(short(SMALL, name).eval_limit):
        doc = task.eval_docs[number]
        prompt = task.fewshot_context(doc, task.config.num_fewshot)
        context = tokenizer(prompt)["input_ids"]
        whole = torch.tensor(tokenizer(prompt + gold_continuation(task, doc))["input_ids"])
        with torch.no_grad():
            logits = model(whole[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, whole[1:], reduction="none")[len(context) - 1 :])
    every = torch.cat(losses)
    assert result.metrics["loss"] == pytest.approx(every.mean().item(), rel=1e-5)
    assert result.protocol["loss_tokens"] == len(every)
    error = ratio_standard_error([loss.sum().item() for loss in losses], [len(loss) for loss in losses])
    assert result.metrics["loss_stderr"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_headline_metric(name, scored):
    result = scored(name)
    metric = {"boolq": "acc", "hellaswag": "acc_norm", "gsm8k": "exact_match_strict_match"}[name]
    assert result.protocol["accuracy_metric"] == metric
    assert result.metrics["accuracy"] == result.metrics[metric]
    assert result.metrics["accuracy_stderr"] == result.metrics[f"{metric}_stderr"]
    assert result.protocol["chance"] == {"boolq": 0.5, "hellaswag": 0.25, "gsm8k": None}[name]
    assert result.metrics["samples_per_second"] > 0


def test_always_giving_the_commonest_answer_is_in_the_protocol(tasks, scored):
    """So that nobody takes a model that has only learnt to say yes for one that reads."""
    result = scored("boolq")
    labels = [tasks["boolq"].eval_docs[number]["label"] for number in range(SMALL.eval_limit)]
    assert result.protocol["majority"] == max(labels.count(0), labels.count(1)) / len(labels)
    for name in ("hellaswag", "gsm8k"):  # each question has endings of its own, or none
        assert scored(name).protocol["majority"] is None


def test_twice_the_same(model, tokenizer, tasks):
    settings = replace(SMALL, eval_batch_size="auto", perplexity_tokens=300, perplexity_seq_len=64)
    first, second = (evaluate(model, tokenizer, tasks["hellaswag"], settings) for _ in range(2))
    for result in (first, second):
        result.metrics.pop("samples_per_second")
    assert first == second


def test_shared_contexts_are_in_the_protocol(model, tokenizer, tasks, scored):
    plain = scored("hellaswag")
    shared = evaluate(model, tokenizer, tasks["hellaswag"], replace(SMALL, share_contexts=True))
    assert (plain.protocol["shared_contexts"], shared.protocol["shared_contexts"]) == (False, True)
    assert shared.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    assert shared.metrics["acc_norm"] == plain.metrics["acc_norm"]


def test_few_shot_by_setting_and_back(model, tokenizer, tasks):
    settings = replace(SMALL, num_fewshot=3, eval_limit=2)
    result = evaluate(model, tokenizer, tasks["boolq"], settings)
    assert result.protocol["num_fewshot"] == 3 and tasks["boolq"].config.num_fewshot == 0
    assert result.samples[0]["arguments"][0][0].count("Question:") == 4
    with pytest.raises(UserError, match="between 0 and"):
        evaluate(model, tokenizer, tasks["boolq"], replace(SMALL, num_fewshot=1000))


def test_protocol_and_samples_are_json(model, tokenizer, tasks):
    settings = replace(SMALL, eval_limit=2, perplexity_tokens=200, perplexity_seq_len=64)
    result = evaluate(model, tokenizer, tasks["boolq"], settings)
    assert json.loads(json.dumps(result.protocol)) == result.protocol
    json.dumps(result.samples)
    expected = {"task": "boolq", "num_fewshot": 0, "limit": 2, "samples": 2, "split": "validation", "batch_size": 4}
    expected |= {"chat_template": None, "device": "cpu", "dtype": "float32", "source": str(made_data_dir())}
    expected |= {"perplexity_corpus": "boolq/validation", "perplexity_seq_len": 64, "perplexity_tokens": 4 * 63}
    assert expected.items() <= result.protocol.items()
    assert math.exp(result.metrics["perplexity_loss"]) == pytest.approx(result.metrics["perplexity"])
    without = evaluate(model, tokenizer, tasks["boolq"], replace(settings, keep_samples=False, perplexity_tokens=0))
    assert not without.samples and "perplexity" not in without.metrics


@pytest.mark.parametrize("name", ["boolq", "hellaswag", "gsm8k"])
def test_scores_say_which_questions_they_are_of(name, model, tokenizer, tmp_path):
    """By what the model was asked and what was right, wherever the rows lay."""
    held_out = "test" if name == "gsm8k" else "validation"
    rows = [json.loads(line) for line in (made_data_dir() / name / f"{held_out}.jsonl").read_text().splitlines()[:2]]
    changed = {
        "boolq": {"answer": not rows[0].get("answer")},
        "hellaswag": {"endings": ["another ending.", *rows[0].get("endings", [])[1:]]},
        "gsm8k": {"question": "How many?"},
    }[name]
    tasks = []
    for place, first in (("one", rows[0]), ("two", rows[0]), ("three", rows[0] | changed)):
        (tmp_path / place / name).mkdir(parents=True)
        text = "\n".join(json.dumps(row) for row in (first, rows[1]))
        (tmp_path / place / name / f"{held_out}.jsonl").write_text(text)
        tasks.append(load_task(name, tmp_path / place, num_fewshot=0))
        if name == "gsm8k":
            tasks[-1].config.generation_kwargs["max_gen_toks"] = 4  # what is answered is no matter
    settings = replace(SMALL, perplexity_tokens=0, eval_limit=None)
    one, two, three = (evaluate(model, tokenizer, task, settings).protocol["questions_sha256"] for task in tasks)
    assert one == two != three and len(one) == 16
    fewer = evaluate(model, tokenizer, tasks[0], replace(settings, eval_limit=1)).protocol["questions_sha256"]
    assert fewer not in (one, three)


def test_a_standard_error_that_does_not_exist_is_absent(model, tokenizer, tasks):
    metrics = evaluate(model, tokenizer, tasks["boolq"], replace(SMALL, eval_limit=1)).metrics
    assert "accuracy" in metrics and "accuracy_stderr" not in metrics


def test_leaves_no_trace(model, tokenizer, tasks, capfd):
    tokenizer.padding_side, seed = "right", random.getstate()
    torch_state, level = torch.get_rng_state(), logging.getLogger("lm_eval").level
    model.train()
    evaluate(
        model, tokenizer, tasks["boolq"], replace(SMALL, eval_limit=2, perplexity_tokens=64, perplexity_seq_len=32)
    )
    evaluate(model, tokenizer, tasks["gsm8k"], replace(SMALL, eval_limit=1))
    assert model.training and tokenizer.padding_side == "right"
    assert random.getstate() == seed and torch.equal(torch.get_rng_state(), torch_state)
    assert logging.getLogger("lm_eval").level == level and "build_all_requests" not in vars(tasks["boolq"])
    assert capfd.readouterr() == ("", "")
    model.eval()


def test_progress_reaches_its_end(model, tokenizer, tasks):
    progress = Recorder()
    settings = replace(SMALL, eval_limit=3, perplexity_tokens=200, perplexity_seq_len=64)
    evaluate(model, tokenizer, tasks["hellaswag"], settings, progress)
    evaluate(model, tokenizer, tasks["gsm8k"], replace(SMALL, eval_limit=2), progress)
    assert progress.stages == [
        ["scoring hellaswag", 12, 12],
        ["perplexity", 4, 4],
        ["scoring gsm8k", 2, 2],
        ["answer loss gsm8k", 2, 2],
    ]


def test_an_unmerged_adapter_is_scored_with_its_adapter(folder, tokenizer, tasks):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_model(folder, "float32", "cpu"), config)
    settings = replace(SMALL, eval_limit=4, perplexity_tokens=128, perplexity_seq_len=64)
    before = evaluate(adapted, tokenizer, tasks["boolq"], settings).metrics
    after = evaluate(adapted.merge_and_unload(), tokenizer, tasks["boolq"], settings).metrics
    plain = evaluate(load_model(folder, "float32", "cpu"), tokenizer, tasks["boolq"], settings).metrics
    assert before["loss"] == pytest.approx(after["loss"], rel=1e-4)
    assert before["perplexity"] == pytest.approx(after["perplexity"], rel=1e-4)
    assert abs(plain["loss"] - after["loss"]) > 1e-3


OTHERS = {
    "arc_easy": {
        "question": "What burns?",
        "choices": {"text": ["oil", "sand"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "winogrande": {"sentence": "Anna saw Emma and _ waved.", "option1": "Anna", "option2": "Emma", "answer": "2"},
    "lambada_openai": {"text": "the water of the river and the water of the sea"},
    "wikitext": {"page": " = Water = \n Water is wet . It is the same as the water of the sea . \n"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_task_of_lm_eval_by_its_name(name, model, tokenizer, tmp_path):
    """Multiple choice, several contexts, one word, running text: no code here knows these names."""
    (tmp_path / name).mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(OTHERS[name]) + "\n")
    task = load_task(name, tmp_path)
    settings = ScoringSettings(eval_batch_size=2, perplexity_tokens=32, perplexity_seq_len=16, keep_samples=True)
    result = evaluate(model, tokenizer, task, settings)
    assert result.protocol["task"] == name and result.metrics["perplexity"] > 1
    if name == "wikitext":
        assert result.metrics["word_perplexity"] > 1 and "loss" not in result.metrics
        return
    (sample,) = result.samples
    gold = {"arc_easy": (0, " oil"), "winogrande": (1, " waved."), "lambada_openai": (0, " sea")}[name]
    context, answer = sample["arguments"][gold[0]]
    assert answer == gold[1] and ("and Emma" in context) == (name == "winogrande")
    assert result.metrics["loss"] * result.protocol["loss_tokens"] == pytest.approx(-sample["resps"][gold[0]][0][0])
    if task.has_training_docs():
        (example,) = training_examples(task, tokenizer, 512)
        assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == context + answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_limit": 0}, "eval_limit is 0"),
        ({"eval_batch_size": "many"}, "eval_batch_size is 'many'; it must be auto"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"perplexity_tokens": -1}, "perplexity_tokens is -1"),
        ({"perplexity_seq_len": 1}, "perplexity_seq_len is 1"),
        ({"perplexity_corpus": "no/such/file"}, "no such file. Give task, wikitext2, c4, fineweb_edu or a text file"),
        ({"perplexity_corpus": "wikitext2"}, "cannot load wikitext2 from the hub"),
    ],
)
def test_wrong_settings_are_one_line(change, message, model, tokenizer, tasks):
    with pytest.raises(UserError, match=message):
        evaluate(model, tokenizer, tasks["boolq"], replace(SMALL, **change))
