"""AdamW with dithered write-back: torch's in float32, and small steps that bfloat16 keeps."""

import copy

import pytest
import torch

from sparse_ft.lora import apply_sparse_lora, validate_sparsity_preserved
from sparse_ft.lora.adamw import DitheredAdamW
from sparse_ft.lora.full import hold_masked_weights
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.examples import Example
from sparse_ft.training import train


def test_in_float32_it_is_torchs(tiny, work):
    ours, theirs = tiny("llama"), tiny("llama")
    options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    work.steps(ours, 4, optimizer=DitheredAdamW(ours.parameters(), **options))
    work.steps(theirs, 4, optimizer=torch.optim.AdamW(theirs.parameters(), **options))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_the_mean_of_many_small_steps_is_kept(dtype):
    weight = torch.nn.Parameter(torch.ones(200, 300, dtype=dtype))
    optimizer = DitheredAdamW([weight], lr=2.0**-14)
    for _ in range(32):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (1 - weight.detach().float()).mean().item() == pytest.approx(32 * 2.0**-14, rel=0.05)


def test_each_step_and_parameter_has_noise_of_its_own():
    made = [torch.nn.Parameter(torch.ones(50, 50, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer, moved = DitheredAdamW(made, lr=2.0**-9), []
    for _ in range(2):
        for weight in made:
            weight.data.fill_(1)
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved += [(weight != 1).detach().clone() for weight in made]
    for i, one in enumerate(moved):
        assert 0.4 < one.float().mean() < 0.6
        assert all(0.4 < (one == other).float().mean() < 0.6 for other in moved[:i])


def test_a_saved_state_goes_on_to_the_bit(tiny, make_masks, work):
    masks = make_masks(tiny("llama"))

    def fresh():
        model = hold_masked_weights(tiny("llama", torch.bfloat16), masks)
        return model, DitheredAdamW(model.parameters(), lr=1e-4, seed=3)

    through, optimizer = fresh()
    work.steps(through, 2, optimizer=optimizer)
    state, half = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(through.state_dict())
    work.steps(through, 2, optimizer=optimizer)
    resumed, again = fresh()
    resumed.load_state_dict(half)
    again.load_state_dict(state)
    assert all(s["exp_avg"].dtype == torch.float32 for s in again.state.values())
    work.steps(resumed, 2, optimizer=again)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_full_moves_bfloat16_weights_at_a_learning_rate_of_full_fine_tuning(rounding, tiny, make_masks, work, tmp_path):
    masks = make_masks(tiny("llama"))
    model = apply_sparse_lora(tiny("llama", torch.bfloat16), None, "full", masks)
    for parameter in model.parameters():
        parameter.data.add_((parameter != 0) * 0.5)  # of the size at which 1e-5 is far below the last place
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = work.batch(rows=8)["input_ids"].tolist()
    examples = [Example(row, 4) for row in ids]
    train(model, examples, TrainingSettings(learning_rate=1e-5, max_steps=4, batch_size=2, rounding=rounding), tmp_path)
    kept = {name: masks[name] for name in masks}
    moved = sum(int((model.get_parameter(n) != before[n])[kept[n]].sum()) for n in kept)
    share = moved / sum(int(mask.sum()) for mask in kept.values())
    assert share > 0.002 if rounding == "dithered" else share < 0.001
    assert validate_sparsity_preserved(model, masks) == {}
