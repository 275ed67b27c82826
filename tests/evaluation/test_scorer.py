"""Scoring with logits at the answers alone, against lm-eval's own method on the same requests."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sparse_ft.errors import UserError
from sparse_ft.evaluation.batches import rows_that_fit
from sparse_ft.evaluation.scorer import Scorer, _in_whole_tiles
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.finding import quiet

PAIRS = [
    ("The water of the river", " is cold"),
    ("The water of the river", " is the same as the water of the sea, and so on, and so on"),
    ("The water of the river", " no"),
    ("The water of the river", " yes"),
    ("Answer:", " yes"),
    ("Answer: ", "no"),
    ("", "What do we do when there is nothing before the answer?"),
    ("x", " y"),
    ("Question: can you play the game with more than two players at the same time? " * 3, " no"),
]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-mixtral"])
def checkpoint(request, tiny_model):
    folder = tiny_model(request.param)
    return load_model(folder, "float32", "cpu"), load_tokenizer(folder)


def requests():
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("max_length", [None, 24])
def test_equal_to_lm_evals_method(batch_size, max_length, checkpoint):
    model, tokenizer = checkpoint
    with quiet():
        ours, theirs = Scorer(model, tokenizer, batch_size), HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
        ours._max_length = theirs._max_length = max_length
        found = ours.loglikelihood(requests())
        wanted = theirs.loglikelihood(requests(), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_contexts_change_the_last_digits_at_most(batch_size, max_length, attention, checkpoint):
    model, tokenizer = checkpoint
    model.set_attn_implementation(attention)
    with quiet():
        ours = Scorer(model, tokenizer, batch_size, share_contexts=True)
        theirs = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
        ours._max_length = theirs._max_length = max_length
        assert ours.shares_contexts
        found = ours.loglikelihood(requests())
        wanted = theirs.loglikelihood(requests(), disable_tqdm=True)
    model.set_attn_implementation("sdpa")
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("window", [8, 20, 100])
def test_shared_contexts_respect_the_window_of_attention(window, tiny_model):
    from transformers import AutoModelForCausalLM

    folder = tiny_model("tiny-mistral")
    model = AutoModelForCausalLM.from_pretrained(folder, sliding_window=window, attn_implementation="sdpa")
    tokenizer = load_tokenizer(folder)
    with quiet():
        ours = Scorer(model, tokenizer, 4, share_contexts=True)
        found = ours.loglikelihood(requests())
        wanted = HFLM(model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests(), disable_tqdm=True)
        free = Scorer(load_model(folder, "float32", "cpu"), tokenizer, 4).loglikelihood(requests())
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-4)
    assert (found[-1][0] != pytest.approx(free[-1][0], rel=1e-4)) == (window < 100)


def test_contexts_are_not_shared_where_the_mask_would_not_hold(checkpoint, monkeypatch):
    model, tokenizer = checkpoint
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    with quiet():
        assert not Scorer(model, tokenizer, share_contexts=True).shares_contexts


def test_more_than_the_model_reads(checkpoint):
    model, tokenizer = checkpoint
    with quiet():
        scorer = Scorer(model, tokenizer)
    scorer._max_length = 200
    with pytest.raises(UserError, match="generates 256 tokens, but the model reads 200 in all"):
        scorer.generate_until([Instance("generate_until", {}, ("Question:", {"until": ["x"]}), 0)])
    scorer._max_length = 4
    with pytest.raises(UserError, match="an answer has 5 tokens, but the model reads 4"):
        scorer._loglikelihood_tokens([(None, [5], [6, 7, 8, 9, 10])])


def test_a_greedy_answer_is_known_as_one(checkpoint):
    model, tokenizer = checkpoint
    context = tokenizer("The water of the river")["input_ids"]
    with torch.no_grad():
        following = model(torch.tensor([context])).logits[0, -1].argsort(descending=True)[:2].tolist()
    with quiet():
        results = Scorer(model, tokenizer)._loglikelihood_tokens([(None, context, [token]) for token in following])
    assert [greedy for _, greedy in results] == [True, False]


def test_a_model_without_the_option_takes_lm_evals_road(checkpoint):
    model, tokenizer = checkpoint

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        @property
        def device(self):
            return self.inner.device

        def tie_weights(self):
            self.inner.tie_weights()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids):
            return self.inner(input_ids)

    with quiet():
        plain = Scorer(Plain(), tokenizer, 4)
        assert not plain._keeps_logits
        found, wanted = (scorer.loglikelihood(requests()) for scorer in (plain, Scorer(model, tokenizer, 4)))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-5)


@pytest.mark.parametrize(
    ("needed", "length"), [({40}, 41), ({3}, 4), (set(range(20, 40)), 60), ({0, 59}, 60), ({5}, 6)]
)
def test_positions_come_in_whole_tiles(needed, length):
    kept = _in_whole_tiles(needed, length)
    assert kept == sorted(set(kept)) and needed <= set(kept) and max(kept) < length
    assert len(kept) == min(length, -(-len(needed) // 16) * 16)


def test_rows_are_halved_until_memory_suffices(checkpoint, monkeypatch):
    """The device's memory error, raised by a model that only takes two rows."""
    model, tokenizer = checkpoint
    forward, sizes = model.forward, []

    def narrow(input_ids, **rest):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return forward(input_ids, **rest)

    with quiet():
        scorer, wanted = Scorer(model, tokenizer), Scorer(model, tokenizer, 2).loglikelihood(requests())
        fixed = Scorer(model, tokenizer, 8)
        monkeypatch.setattr(model, "forward", narrow)
        assert scorer.loglikelihood(requests()) == wanted
        assert scorer.batch_sizes_used[-1] == 2 and sizes[0] > 2
        with pytest.raises(torch.OutOfMemoryError):
            fixed.loglikelihood(requests())


def test_rows_that_fit(checkpoint, monkeypatch):
    model, _ = checkpoint
    assert [rows_that_fit(model, length) for length in (16, 64, 300, 2048)] == [16, 16, 2, 1]
    assert rows_that_fit(model, 2048, positions=1, tokens_at_once=1) == 16
    monkeypatch.setattr("sparse_ft.evaluation.batches._memory", lambda device: 8_000_000)
    fewer = rows_that_fit(model, 64)
    assert 1 <= fewer < 16 and rows_that_fit(model, 64, positions=1) > fewer
