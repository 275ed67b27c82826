"""Block by block must be the model, and what is watched must be what comes in."""

import pytest
import torch

from sparse_ft.models.blocks import BlockModel, HiddenStates, InputWatch, sample_batches
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model

KINDS = ["tiny-llama", "tiny-mistral", "tiny-mixtral"]


@pytest.fixture
def text():
    """Token ids for the tiny models, int64 [4, 24]."""
    return torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def blockwise(tiny_model, tmp_path, text):
    def walk(kind, dtype=torch.float32):
        """Yields (block, model, watch, hidden states that came in) for every block."""
        model = BlockModel(Checkpoint(tiny_model(kind)), dtype, torch.device("cpu"))
        states = model.embed(text, tmp_path / "hidden_0.bin")
        for block in range(model.count):
            model.load(block)
            watch = InputWatch(model, model.names(block), hessians=True)
            following = HiddenStates(tmp_path / f"hidden_{block + 1}.bin", states.shape, dtype)
            model.run(block, states, following, watch)
            yield block, model, watch, states.read(slice(None), torch.device("cpu")), following
            model.unload(block)
            states = following

    return walk


# Their blocks are called with different masks, or rotary tables, or take no notice of them.
ALTERNATING = ["tiny-gemma2", "tiny-gemma3_text", "tiny-exaone4", "tiny-smollm3"]


@pytest.mark.parametrize("kind", [*KINDS, *ALTERNATING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_the_whole_models(blockwise, tiny_model, text, kind, dtype):
    whole = load_model(tiny_model(kind), dtype, "cpu")
    with torch.no_grad():
        expected = whole(input_ids=text, output_hidden_states=True, use_cache=False).hidden_states
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
        for block, _, _, hidden, following in blockwise(kind, dtype):
            torch.testing.assert_close(hidden, expected[block], **tolerance)
            last = following.read(slice(None), torch.device("cpu"))
        torch.testing.assert_close(whole.model.norm(last), expected[-1], **tolerance)


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mistral", *ALTERNATING])
def test_norms_and_hessians_are_those_of_forward_hooks(blockwise, tiny_model, text, kind):
    whole = load_model(tiny_model(kind), "float32", "cpu")
    seen = {}
    for name, module in whole.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: seen.update({f"model.layers.{name}.weight": inputs[0]})
            )
    with torch.no_grad():
        whole(input_ids=text)
    for block, model, watch, _, _ in blockwise(kind):
        assert len(model.names(block)) == 7
        for name in model.names(block):
            x = seen[name].reshape(-1, seen[name].shape[-1]).double()
            norm = watch.input_norm(name)
            torch.testing.assert_close(norm.double(), x.norm(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(watch.hessian(name).double(), x.T @ x, rtol=1e-3, atol=1e-3)
            assert watch.tokens(name) == text.numel()
        q, k = (f"model.layers.{block}.self_attn.{p}_proj.weight" for p in "qk")
        assert watch.hessian(q) is watch.hessian(k)  # one input, one sum


@pytest.mark.parametrize("kind", ["tiny-gemma2", "tiny-gemma3_text"])
def test_blocks_of_two_kinds_are_called_with_what_the_model_calls_each_with(tiny_model, text, kind):
    whole = load_model(tiny_model(kind), "float32", "cpu")
    expected = []
    for layer in whole.model.layers:
        layer.register_forward_pre_hook(lambda _, __, keywords: expected.append(keywords), with_kwargs=True)
    with torch.no_grad():
        whole(input_ids=text, use_cache=False)
    model = BlockModel(Checkpoint(tiny_model(kind)), torch.float32, torch.device("cpu"))
    model.prepare(text)
    masks = []
    for block, keywords in enumerate(expected):
        _, ours = model.call(block, *text.shape)
        masks.append(ours["attention_mask"])
        torch.testing.assert_close(masks[-1], keywords["attention_mask"])
        torch.testing.assert_close(ours["position_embeddings"], keywords["position_embeddings"])
    sliding, full = masks
    assert full is None or not torch.equal(sliding, full)  # or this text is too short to tell


def test_experts_are_told_apart(blockwise, tiny_model, text):
    whole = load_model(tiny_model("tiny-mixtral"), "float32", "cpu")
    routed = {}
    for block, layer in enumerate(whole.model.layers):
        layer.mlp.experts.register_forward_hook(
            lambda _, inputs, __, block=block: routed.update({block: tuple(value.detach() for value in inputs)})
        )
    with torch.no_grad():
        whole(input_ids=text)
        for block, _, watch, _, _ in blockwise("tiny-mixtral"):
            hidden, chosen = routed[block][:2]
            experts = whole.model.layers[block].mlp.experts
            for expert in range(4):
                x = hidden[(chosen == expert).any(dim=1)]
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
                prefix = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
                for matrix, values in (("w1", x), ("w3", x), ("w2", inner)):
                    name = f"{prefix}.{matrix}.weight"
                    norm = watch.input_norm(name)
                    torch.testing.assert_close(norm, values.norm(dim=0), rtol=1e-3, atol=1e-4)
                    assert watch.tokens(name) == len(x)


def test_one_block_is_in_memory(blockwise):
    for block, model, _, _, _ in blockwise("tiny-llama"):
        whole = [not next(layer.parameters()).is_meta for layer in model.model.model.layers]
        assert whole == [index == block for index in range(model.count)]


def test_samples_go_together_up_to_the_budget():
    assert sample_batches(5, 1024) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert sample_batches(2, 5000) == [slice(0, 1), slice(1, 2)]
