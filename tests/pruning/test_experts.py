"""REAP's saliencies against a plain forward, and the smaller model against the big one that routes around experts."""

import json
import shutil

import pytest
import torch
from mixtures import MIXTURES, mixtures_of, without
from safetensors.torch import load_file, save_file

from sparse_ft.errors import UserError
from sparse_ft.models.blocks import BlockModel
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.models.mixtures import kept_experts
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.pruning.blockstate import BlockState
from sparse_ft.pruning.experts import choose_experts, expert_saliencies, reap
from sparse_ft.pruning.shrink import shrink_checkpoint
from sparse_ft.validation import validate_checkpoint


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(3))


def generate(folder, out, tokens, *levels, **how):
    settings = PruningSettings(method="experts", sparsities=levels, **how)
    return MaskGenerator(folder, settings, Calibration(tokens)).generate(out, figures="none")


@torch.no_grad()
def direct(model, tokens):
    """REAP of a model in memory, by what goes into its experts and the matrices of each."""
    seen = {}
    for block, mixture in mixtures_of(model).items():
        seen[block] = []
        mixture.experts.register_forward_pre_hook(lambda _, given, block=block: seen[block].append(given))
    for sample in tokens:
        model(input_ids=sample[None], use_cache=False)
    found = {}
    for block, mixture in mixtures_of(model).items():
        hidden, chosen, weights = (torch.cat(parts) for parts in zip(*seen[block], strict=True))
        gates, found[block] = weights / weights.sum(1, keepdim=True), []
        for e, (both, down) in enumerate(zip(mixture.experts.gate_up_proj, mixture.experts.down_proj, strict=True)):
            token, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = (hidden[token] @ both.T).chunk(2, dim=1)
            output = (torch.nn.functional.silu(gate) * up) @ down.T
            total = (gates[token, place] * output.norm(dim=1)).sum()
            found[block].append(total / len(token) if len(token) else total * 0)
    return {block: torch.stack(values) for block, values in found.items()}


@pytest.fixture
def mixture(tiny_model, tmp_path):
    """Folder of a tiny mixture, by name; a router that corrects its choice does so, which a new model's does not."""

    def write(kind):
        folder = shutil.copytree(tiny_model(kind), tmp_path / kind)
        weights = load_file(folder / "model.safetensors")
        for name, tensor in weights.items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.mark.parametrize("kind", MIXTURES)
def test_saliencies_are_those_of_a_plain_forward(mixture, tokens, tmp_path, kind):
    folder = mixture(kind)
    model = BlockModel(Checkpoint(folder), torch.float32, torch.device("cpu"))
    found = expert_saliencies(model, tokens, reap, BlockState(tmp_path, {}))
    expected = direct(load_model(folder, "float32", "cpu"), tokens)
    assert found.keys() == expected.keys() and found
    for block, values in found.items():
        assert values.dtype == torch.float64
        torch.testing.assert_close(values.float(), expected[block], rtol=1e-4, atol=1e-6)


def test_an_expert_that_no_token_reaches_goes_first_and_is_named(tiny_model, tmp_path):
    folder = tiny_model("tiny-qwen3_moe")
    few = torch.full((1, 2), 7)
    (made,) = generate(folder, tmp_path, few, 1 / 3)
    model = BlockModel(Checkpoint(folder), torch.float32, torch.device("cpu"))
    saliencies = expert_saliencies(model, few, reap, BlockState(tmp_path, {}))
    unseen = (saliencies[1] == 0).nonzero()[:, 0].tolist()
    assert len(unseen) >= 2  # two tokens of one kind reach four of six experts at most
    assert kept_experts(Checkpoint(folder).config, made.load())[1] == sorted(set(range(6)) - set(unseen[:2]))
    assert f"block 1, expert {unseen[0]}: no calibration token came here" in made.metadata["notes"][0]


def test_the_lowest_go_ties_by_position():
    assert choose_experts(torch.tensor([3.0, 1.0, 1.0, 0.5]), 2).tolist() == [True, False, True, False]
    assert choose_experts(torch.tensor([3.0, 1.0]), 0).all()


def test_masks_are_of_whole_experts_and_nested(tiny_model, tokens, tmp_path):
    folder = tiny_model("tiny-qwen3_moe")
    checkpoint = Checkpoint(folder)
    saliencies = direct(load_model(folder, "float32", "cpu"), tokens)
    levels = (0.0, 1 / 6, 1 / 3, 2 / 3)
    before = None
    for level, made in zip(levels, generate(folder, tmp_path, tokens, *levels), strict=True):
        masks, gone = made.load(), round(6 * level)
        order = saliencies[1].argsort()
        assert kept_experts(checkpoint.config, masks) == {1: sorted(order[gone:].tolist())}
        assert all(masks.kept(name) in (0, masks.weights(name)) for name in masks)
        lost = sum(masks.weights(name) for name in masks if not masks.kept(name))
        assert made.pruned == lost == gone * 3 * 32 * 48
        assert made.achieved == pytest.approx(lost / masks.n_weights)
        assert made.metadata["importance"] == "reap"
        if before is not None:
            assert all(not (masks[name] & ~before[name]).any() for name in masks)
        before = masks


@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_a_smaller_model_says_what_the_big_one_says_without_those_experts(mixture, tokens, tmp_path, kind):
    folder = mixture(kind)
    checkpoint = Checkpoint(folder)
    (made,) = generate(folder, tmp_path / "masks", tokens, 1 / 3 if kind == "tiny-qwen3_moe" else 0.5)
    masks = made.load()
    small = shrink_checkpoint(folder, masks, tmp_path / "small")
    model, ids = load_model(folder, "float32", "cpu"), tokens[:2]
    kept = kept_experts(checkpoint.config, masks)
    every = range(len(next(iter(mixtures_of(model).values())).experts.down_proj))
    dense = model(input_ids=ids).logits
    with without(model, {block: sorted(set(every) - set(left)) for block, left in kept.items()}):
        expected = model(input_ids=ids).logits
    smaller = load_model(small, "float32", "cpu")
    torch.testing.assert_close(smaller(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (dense - expected).abs().max() > 1e-2
    assert torch.equal(model(input_ids=ids).logits, dense)  # the oracle left no trace
    for block, mixture in mixtures_of(smaller).items():
        assert len(mixture.gate.weight) == len(mixture.experts.down_proj) == len(kept[block])
    proof = validate_checkpoint(small, masks)
    assert proof.ok and proof.sparsity == pytest.approx(masks.sparsity)


def test_what_cannot_be_done_is_one_line_before_anything_is_read(tiny_model, tokens, tmp_path):
    def refused(kind, level, **how):
        with pytest.raises(UserError) as caught:
            MaskGenerator(tiny_model(kind), PruningSettings(method="experts", sparsities=(level,), **how))
        return str(caught.value)

    assert "calibration text is needed" in refused("tiny-mixtral", 0.5)
    assert "not experts" in refused("tiny-mixtral", 0.5, importance="wanda")
    assert "scope row is not its own" in refused("tiny-mixtral", 0.5, scope="row")
    assert "update refit: method experts removes whole experts" in refused("tiny-mixtral", 0.5, update="refit")
    with pytest.raises(UserError, match="REAP prunes experts, not unstructured"):
        PruningSettings(importance="reap").check()
    with pytest.raises(UserError, match="a llama model has no experts"):
        generate(tiny_model("tiny-llama"), tmp_path, tokens, 0.5)
    with pytest.raises(
        UserError, match=r"3 of 4 experts would go, and a block keeps at least 2.* largest level is 0\.5"
    ):
        generate(tiny_model("tiny-mixtral"), tmp_path, tokens, 0.25, 0.75)
    assert not any(tmp_path.iterdir())


def test_a_router_that_knows_groups_is_refused(tiny_model, tokens, tmp_path):
    folder = tmp_path / "grouped"
    folder.mkdir()
    for file in tiny_model("tiny-glm4_moe").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_group": 2}))
    with pytest.raises(UserError, match=r"parts the experts into 2 groups \(n_group\)"):
        generate(folder, tmp_path, tokens, 0.5)
