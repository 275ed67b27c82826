"""Block reconstruction through the engine, against models put together in memory block by block."""

import pytest
import torch

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.validation import validate_checkpoint

KINDS = ["tiny-llama", "tiny-mistral", "tiny-mixtral"]
TUNED = {"reconstruct": "block", "reconstruct_epochs": 4, "reconstruct_batch": 3, "reconstruct_learning_rate": 5e-4}


@pytest.fixture
def text():
    """Token ids, int64 [10, 24]: one sample is held out."""
    return torch.randint(3, 500, (10, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def generate(tiny_model, text, tmp_path):
    def run(kind, name, **how):
        settings = PruningSettings(**{"dtype": "float32", "sparsities": (0.6,), **how})
        generator = MaskGenerator(tiny_model(kind), settings, Calibration(text, {"task": "noise"}))
        return generator.generate(tmp_path / name, figures="none")

    return run


@torch.no_grad()
def states(model, text):
    """What leaves each block of a model."""
    found, hooks = [], []
    for block in model.model.layers:
        hooks.append(block.register_forward_hook(
            lambda module, inputs, out: found.append(out[0] if isinstance(out, tuple) else out)
        ))  # fmt: skip
    model(input_ids=text)
    for hook in hooks:
        hook.remove()
    return found


def mixed(folder, masks, tuned, blocks):
    """The dense model under its masks, but for the first blocks, which are those of a tuned checkpoint."""
    model = load_model(folder, "float32", "cpu")
    for name, weight in model.named_parameters():
        if name not in masks:
            continue
        with torch.no_grad():
            new = Checkpoint(tuned).tensor(name) if int(name.split(".")[2]) < blocks else weight * masks[name]
            weight.copy_(new)
    return model


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mistral"])
@pytest.mark.parametrize("seed", [0, 3])
def test_errors_are_those_of_the_dense_path_on_the_sample_held_out(generate, tiny_model, text, kind, seed):
    (result,) = generate(kind, "tuned", importance="wanda", scope="row", seed=seed, **TUNED)
    folder, masks = tiny_model(kind), result.load()
    (held_out,) = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[:1].tolist()
    dense = states(load_model(folder, "float32", "cpu"), text)
    said = result.metadata["reconstruction"]
    assert (said["epochs"], said["batch"], said["learning_rate"]) == (4, 3, 5e-4)
    assert len(said["blocks"]) == len(dense) > 1
    for block, (errors, targets) in enumerate(zip(said["blocks"], dense, strict=True)):
        for when, tuned in (("before", block), ("after", block + 1)):
            found = states(mixed(folder, masks, result.checkpoint, tuned), text)[block]
            error = (found - targets)[held_out].square().mean() / targets.square().mean()
            assert errors[when] == pytest.approx(float(error), rel=1e-3)
        assert errors["after"] < errors["before"] and 1 <= errors["epoch"] <= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {"importance": "wanda", "scope": "row"},
        {"importance": "alps"},
        {"importance": "sparsegpt", "method": "semi_structured", "sparsities": (0.5,)},
        {"importance": "magnitude", "scope": "global"},
        {"importance": "magnitude", "method": "structured", "update": "refit"},
        {"importance": "magnitude", "refine": "swaps"},
        {"method": "random"},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_after_any_rule_masks_hold_and_blocks_come_nearer(generate, tiny_model, text, kind, how):
    (plain,) = generate(kind, "plain", **how)
    (tuned,) = generate(kind, "tuned", **how, **TUNED)
    before, after = plain.load(), tuned.load()
    assert validate_checkpoint(tuned.checkpoint, after).ok
    assert tuned.metadata["reconstruct"] == "block" and "reconstruct" not in plain.metadata
    looks_at_text = how.get("importance") not in ("magnitude", None) or "refine" in how
    for name in before:  # what goes into the first block hangs on no mask
        if ".layers.0." in name or not looks_at_text:
            assert torch.equal(before[name], after[name])
    blocks = tuned.metadata["reconstruction"]["blocks"]
    assert all(block["after"] <= block["before"] for block in blocks)
    assert any(block["after"] < block["before"] for block in blocks)
    assert Checkpoint(tuned.checkpoint).dtype_name(next(iter(after))) == Checkpoint(tiny_model(kind)).dtype_name(
        next(iter(after))
    )


def test_no_epoch_changes_nothing(generate, tiny_model):
    (result,) = generate("tiny-mixtral", "none", **TUNED | {"reconstruct_epochs": 0})
    masks, made, dense = result.load(), Checkpoint(result.checkpoint), Checkpoint(tiny_model("tiny-mixtral"))
    assert all(torch.equal(made.tensor(name), dense.tensor(name) * masks[name]) for name in masks)
    for block in result.metadata["reconstruction"]["blocks"]:
        assert block["before"] == block["after"] > 0 and block["epoch"] == 0


def test_levels_have_weights_of_their_own_and_masks_that_nest(generate, tiny_model):
    whole, low, high, nothing = generate("tiny-llama", "all", importance="wanda", sparsities=(0, 0.3, 0.6, 1), **TUNED)
    (alone,) = generate("tiny-llama", "alone", importance="wanda", sparsities=(0.3,), **TUNED)
    assert alone.checksum == low.checksum and alone.metadata["reconstruction"] == low.metadata["reconstruction"]
    assert Checkpoint(alone.checkpoint).fingerprint == Checkpoint(low.checkpoint).fingerprint
    below, above = low.load(), high.load()
    assert not any((above[name] & ~below[name]).any() for name in above)
    assert low.checkpoint != high.checkpoint
    pairs = zip(*(result.metadata["reconstruction"]["blocks"] for result in (low, high)), strict=True)
    assert all(easy["before"] < hard["before"] for easy, hard in pairs)
    dense, kept = Checkpoint(tiny_model("tiny-llama")), Checkpoint(whole.checkpoint)
    assert all(torch.equal(kept.tensor(name), dense.tensor(name)) for name in dense.prunable)
    assert whole.metadata["reconstruction"]["blocks"] == [{"before": 0, "after": 0, "epoch": 0}] * 2
    assert not any(Checkpoint(nothing.checkpoint).tensor(name).any() for name in dense.prunable)
