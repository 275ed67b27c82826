"""A model whose logits are no numbers has no score, whatever the task, and whatever argmax would name."""

import math

import pytest
import torch

from sparse_ft.evaluation import NonFiniteScoresError, ScoringSettings, evaluate
from sparse_ft.evaluation.finite import check_metrics
from sparse_ft.evaluation.perplexity import perplexity
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.made import made_data_dir


@pytest.fixture
def model(tiny_model):
    return load_model(tiny_model("tiny-llama"), "float32", "cpu")


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model("tiny-llama"))


def _break(model, value, row=None):
    # In place: the head shares its weight with the embedding, and lm-eval ties again what a new tensor unties.
    with torch.no_grad():
        model.get_output_embeddings().weight[slice(None) if row is None else row] = value


@pytest.mark.parametrize(
    ("name", "row", "value"),
    [
        *(("boolq", row, value) for row in (None, 7) for value in (math.nan, math.inf)),
        ("hellaswag", 7, math.nan),
        ("gsm8k", None, math.nan),  # what is written is looked at too
        ("gsm8k", 7, math.inf),
    ],
)
def test_no_score_without_numbers(name, row, value, model, tokenizer):
    _break(model, value, row)
    settings = ScoringSettings(eval_limit=2, num_fewshot=0, perplexity_tokens=0)
    with pytest.raises(NonFiniteScoresError, match="NaN or infinite"):
        evaluate(model, tokenizer, load_task(name, made_data_dir()), settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_perplexity_without_numbers(value, model, tokenizer):
    _break(model, value)
    with pytest.raises(NonFiniteScoresError, match="loss on running text"):
        perplexity(model, tokenizer, ["one two three " * 30], 16)


def test_a_perplexity_above_every_float_is_absent_and_its_loss_is_there(model, tokenizer):
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    settings = ScoringSettings(eval_limit=2, perplexity_tokens=256, perplexity_seq_len=64)
    found = evaluate(model, tokenizer, load_task("boolq", made_data_dir()), settings)
    assert "perplexity" not in found.metrics and "perplexity_stderr" not in found.metrics
    assert found.metrics["perplexity_loss"] > 710
    assert found.protocol["perplexity_absent"]
    assert all(math.isfinite(value) for value in found.metrics.values())


def test_a_score_of_lm_eval_above_every_float_is_none(model, tokenizer, tmp_path):
    (tmp_path / "lambada_openai").mkdir()
    (tmp_path / "lambada_openai" / "test.jsonl").write_text('{"text": "the water of the river and the sea"}\n')
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with pytest.raises(NonFiniteScoresError, match="lambada_openai: a score is above every float"):
        evaluate(model, tokenizer, load_task("lambada_openai", tmp_path), ScoringSettings(perplexity_tokens=0))


def test_only_a_standard_error_may_be_missing():
    assert check_metrics({"acc": 0.5, "acc_stderr": math.nan, "loss_stderr": math.inf}) == {"acc": 0.5}
    with pytest.raises(NonFiniteScoresError, match="acc is nan"):
        check_metrics({"acc": math.nan})
