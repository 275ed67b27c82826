"""Block reconstruction of a real decoder block, and of one matrix, where the optimum is known."""

import pytest
import torch
from errors import output_error
from torch.func import functional_call
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sparse_ft.pruning.hessian import normalise
from sparse_ft.pruning.patterns import layer_mask
from sparse_ft.pruning.reconstruct import reconstruct
from sparse_ft.pruning.refit import refit

SAMPLES, LENGTH, HIDDEN = 20, 12, 32


class Block:
    """A decoder block with random weights, half of them pruned, and what the dense one gives out."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
        config._attn_implementation = "sdpa"
        self.dtype, self.module = dtype, LlamaDecoderLayer(config, 0).to(dtype).eval()
        # correlated, so that weights can answer for each other
        self.inputs = (torch.randn(SAMPLES, LENGTH, 6) @ torch.randn(6, HIDDEN)).to(dtype)
        place = torch.arange(LENGTH)[None]
        self.embeddings = LlamaRotaryEmbedding(config)(self.inputs, place)
        self.weights = {n: p.detach().clone() for n, p in self.module.named_parameters() if p.ndim == 2}
        with torch.no_grad():
            self.targets = self(self.weights, self.inputs)
        self.masks = {n: layer_mask(w.abs(), w.numel() // 2) for n, w in self.weights.items()}

    def __call__(self, weights, hidden):
        cast = {name: weight.to(self.dtype) for name, weight in weights.items()}
        out = functional_call(self.module, cast, (hidden,), {"position_embeddings": self.embeddings})
        return out[0] if isinstance(out, tuple) else out

    def tune(self, **settings):
        return reconstruct(self, self.weights, self.masks, self.inputs, self.targets, **settings)

    def error(self, weights, samples):
        with torch.no_grad():
            difference = (self(weights, self.inputs[samples]) - self.targets[samples]).square().mean()
        return float(difference / self.targets.square().mean())


@pytest.fixture(scope="module")
def block():
    return Block()


def test_no_step_changes_nothing(block):
    result = block.tune(epochs=0)
    for name, weight in block.weights.items():
        assert torch.equal(result.weights[name], weight * block.masks[name])
    assert result.before == result.after > 0
    assert (result.epoch, len(result.errors)) == (0, 1)


def test_the_error_falls_and_masks_hold(block):
    copies = {name: weight.clone() for name, weight in block.weights.items()}
    seen = []
    result = block.tune(epochs=10, batch=4, learning_rate=2e-3, advance=seen.append)
    assert result.after < 0.7 * result.before
    assert result.after == min(result.errors) == result.errors[result.epoch]
    assert result.before == result.errors[0]
    assert sum(seen) == 11 * 2 + 10 * 18  # 2 of 20 samples are held out, and judged before and after each epoch
    for name, weight in result.weights.items():
        assert (weight[~block.masks[name]] == 0).all()
        assert not weight.requires_grad
        assert torch.equal(block.weights[name], copies[name])
    assert block.error(result.weights, slice(None)) < 0.7 * block.error(block.tune(epochs=0).weights, slice(None))


def test_the_error_is_that_of_the_samples_held_out(block):
    result = block.tune(epochs=0, held_out=0.2, seed=5)
    chosen = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5))[:4]
    start = {name: weight * block.masks[name] for name, weight in block.weights.items()}
    assert result.before == pytest.approx(block.error(start, chosen), rel=1e-5)


def test_the_same_arguments_give_the_same_weights(block):
    first, second = block.tune(epochs=2, seed=1), block.tune(epochs=2, seed=1)
    assert first.errors == second.errors
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert block.tune(epochs=2, seed=2).errors != first.errors


@pytest.mark.parametrize("rate", [3.0, float("inf")])
def test_tuning_that_does_harm_is_not_kept(block, rate):
    result = block.tune(epochs=3, learning_rate=rate)
    assert result.epoch == 0
    assert result.after == result.before
    assert all(torch.equal(result.weights[name], w * block.masks[name]) for name, w in block.weights.items())


def test_a_single_sample_is_judged_by_itself(block):
    result = reconstruct(block, block.weights, block.masks, block.inputs[:1], block.targets[:1], 5, 1, 1e-3)
    assert result.after < result.before


def test_a_block_in_bfloat16_is_tuned_in_float32():
    block = Block(torch.bfloat16)
    result = block.tune(epochs=5, batch=4, learning_rate=2e-3)
    assert result.after < 0.9 * result.before
    assert {weight.dtype for weight in result.weights.values()} == {torch.float32}


def test_of_a_single_matrix_it_finds_the_least_squares_optimum():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, 16, generator=generator)
    weight = torch.randn(10, 16, generator=generator)
    mask = torch.rand(10, 16, generator=generator) < 0.5
    targets = inputs @ weight.T
    start = {"w": torch.zeros_like(weight)}
    result = reconstruct(lambda weights, x: x @ weights["w"].T, start, {"w": mask}, inputs, targets, 60, 8, 3e-2)
    flat = inputs.flatten(0, 1)
    parts = normalise(flat.T @ flat, damping=0)
    best = output_error(refit(weight, mask, parts, 100, 1e-6), weight, parts)
    assert best <= output_error(result.weights["w"], weight, parts) < 1.05 * best
