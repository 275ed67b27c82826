"""Token sequences: those of scoring, cut on the left, the answer whole."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from sparse_ft.errors import UserError
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import (
    calibration_texts,
    calibration_tokens,
    gold_continuation,
    gold_index,
    held_out_texts,
    token_stream,
    training_examples,
)
from sparse_ft.tasks.finding import quiet


class Recorder(HFLM):
    """lm-eval's model, remembering the tokens it is asked to score."""

    def _loglikelihood_tokens(self, requests, **_):
        self.seen = [(context, answer) for _, context, answer in requests]
        return [(0.0, False)] * len(requests)


@pytest.fixture(scope="module")
def recorder(tiny_model):
    from sparse_ft.models.loading import load_model, load_tokenizer

    folder = tiny_model("tiny-llama")
    with quiet():
        return Recorder(load_model(folder, "float32", "cpu"), tokenizer=load_tokenizer(folder))


@pytest.mark.parametrize("name", ["boolq", "hellaswag"])
def test_training_tokens_are_the_scored_tokens(name, data_dir, tokenizer, recorder, monkeypatch):
    """Trained on the held-out rows for once, the examples are what lm-eval scores for the right answers."""
    task = load_task(name, data_dir)
    monkeypatch.setattr(task, "training_docs", lambda: task.eval_docs)
    with quiet():
        task.build_all_requests()
    recorder.loglikelihood(task.instances, disable_tqdm=True)
    docs = list(task.eval_docs)
    scored = []
    for instance, tokens in zip(task.instances, recorder.seen, strict=True):
        if instance.idx == gold_index(task, docs[instance.doc_id]):
            scored.append(tokens)
    examples = training_examples(task, tokenizer, 512)
    assert len(examples) == len(docs)
    found = [
        (example.input_ids[: example.answer_start], example.input_ids[example.answer_start :]) for example in examples
    ]
    assert sorted(found) == sorted(scored)


def test_answers_in_words(data_dir):
    task = load_task("boolq", data_dir)
    assert [gold_continuation(task, doc) for doc in task.eval_docs] == [" yes", " no", " yes"]
    task = load_task("hellaswag", data_dir)
    assert [gold_continuation(task, doc) for doc in task.eval_docs] == [" sits down.", " Paint the rice."]
    task = load_task("gsm8k", data_dir)
    assert gold_continuation(task, task.eval_docs[0]) == " 20+2 = <<20+2=22>>22\n#### 22"


def test_generated_answers_end_and_chosen_ones_do_not(data_dir, tokenizer):
    gsm8k = training_examples(load_task("gsm8k", data_dir), tokenizer, 512)
    assert all(example.input_ids[-1] == tokenizer.eos_token_id for example in gsm8k)
    boolq = training_examples(load_task("boolq", data_dir), tokenizer, 512)
    assert all(tokenizer.eos_token_id not in example.input_ids for example in boolq)
    assert {tokenizer.decode(example.input_ids[example.answer_start :]) for example in boolq} == {" no", " yes"}


def test_no_example_before_the_question(data_dir, tokenizer):
    """Few-shot is for scoring; training shows one question at a time."""
    five, none = (load_task("gsm8k", data_dir, num_fewshot=shots) for shots in (5, 0))
    assert training_examples(five, tokenizer, 512) == training_examples(none, tokenizer, 512)


def test_prompts_lose_their_left_and_answers_nothing(data_dir, tokenizer):
    task = load_task("hellaswag", data_dir)
    whole = training_examples(task, tokenizer, 512)
    shortest = max(len(example.input_ids) - example.answer_start for example in whole) + 1
    for cut, full in zip(training_examples(task, tokenizer, shortest), whole, strict=True):
        assert len(cut.input_ids) <= shortest and cut.answer_start >= 1
        assert cut.input_ids == full.input_ids[-len(cut.input_ids) :]
        assert cut.input_ids[cut.answer_start :] == full.input_ids[full.answer_start :]
    with pytest.raises(UserError, match=f"set it to {shortest} or more"):
        training_examples(task, tokenizer, shortest - 1)


def test_seed_orders_and_limit_takes_the_first(data_dir, tokenizer):
    task = load_task("boolq", data_dir)
    every = training_examples(task, tokenizer, 512, seed=3)
    assert every == training_examples(task, tokenizer, 512, seed=3)
    assert every[:2] == training_examples(task, tokenizer, 512, limit=2, seed=3)
    other = training_examples(task, tokenizer, 512, seed=4)
    assert other != every and sorted(map(str, other)) == sorted(map(str, every))


def test_texts_are_of_their_split_and_not_repeated(data_dir):
    boolq = load_task("boolq", data_dir)
    assert list(held_out_texts(boolq)) == ["Lamps -- They burnt oil.", "Tea -- It is made hot."]
    calibration = list(calibration_texts(boolq))
    assert len(calibration) == 8 and all(text.startswith("Words -- ") for text in calibration)
    assert list(calibration_texts(boolq, seed=1)) != calibration
    hellaswag = load_task("hellaswag", data_dir)
    assert list(held_out_texts(hellaswag))[1] == "Food: How to cook rice. Wash it. Use cold water. Paint the rice."
    gsm8k = load_task("gsm8k", data_dir)
    expected = "Question: What is 20 + 2?\nAnswer: 20+2 = <<20+2=22>>22\n#### 22"
    assert next(held_out_texts(gsm8k)) == expected


def test_a_stream_is_the_tokens_of_the_joined_text(tokenizer):
    texts = [f"Text number {number} about water, rivers and lamps." for number in range(60)]
    whole = tokenizer("\n\n".join(texts))["input_ids"]
    assert whole[0] == tokenizer.bos_token_id and whole.count(tokenizer.bos_token_id) == 1
    assert token_stream(iter(texts), tokenizer) == whole
    part = token_stream(iter(texts), tokenizer, 100)
    assert 100 <= len(part) < len(whole) and part[:100] == whole[:100]
    assert token_stream(texts, tokenizer, 10 * len(whole)) == whole
    assert token_stream([], tokenizer) == []


def test_calibration_windows(data_dir, tokenizer):
    task = load_task("boolq", data_dir)
    windows = calibration_tokens(task, tokenizer, 4, 16, seed=5)
    assert windows.shape == (4, 16) and windows.dtype == torch.int64
    stream = tokenizer("\n\n".join(calibration_texts(task, 5)))["input_ids"]
    assert windows.flatten().tolist() == stream[:64]
    assert torch.equal(windows, calibration_tokens(task, tokenizer, 4, 16, seed=5))
    assert not torch.equal(windows, calibration_tokens(task, tokenizer, 4, 16, seed=6))
    with pytest.raises(UserError, match=f"gives {len(stream) // 16};"):
        calibration_tokens(task, tokenizer, 10_000, 16)


def test_tasks_without_train_say_so(data_dir, tokenizer, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "validation.jsonl").write_bytes((data_dir / "boolq" / "validation.jsonl").read_bytes())
    task = load_task("boolq", tmp_path)
    for call in (
        lambda: training_examples(task, tokenizer, 512),
        lambda: calibration_tokens(task, tokenizer, 1, 8),
    ):
        with pytest.raises(UserError, match="boolq has no training rows"):
            call()
