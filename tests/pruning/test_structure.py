import numpy as np
import pytest
import torch

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning.sources import MagnitudeSource, ScoreSource
from sparse_ft.pruning.structure import Channels, block_counts, choose_units, families, family_scores


def test_units_own_every_weight_of_their_block(tiny_model):
    for kind in ("tiny-llama", "tiny-mistral", "tiny-mixtral"):
        checkpoint = Checkpoint(tiny_model(kind))
        shapes = checkpoint.prunable_shapes()
        total = sum(family.units * family.unit_weights for family in families(checkpoint.config, shapes))
        assert total == sum(int(np.prod(shape)) for shape in shapes.values())


def test_scores_are_means_over_the_coupled_lines(write_llama):
    folder, tensors = write_llama(dtype=torch.float32)
    checkpoint = Checkpoint(folder)
    source = MagnitudeSource(checkpoint, checkpoint.prunable)
    members = families(checkpoint.config, source.shapes)
    w = {n.split(".")[-2]: t.abs().double() for n, t in tensors.items() if ".layers.1." in n}
    channels = (w["gate_proj"].sum(1) + w["up_proj"].sum(1) + w["down_proj"].sum(0)) / (3 * 40)
    groups = w["q_proj"].view(2, 20, 40).sum((1, 2)) + w["o_proj"].view(40, 2, 20).sum((0, 2))
    groups += w["k_proj"].view(2, 10, 40).sum((1, 2)) + w["v_proj"].view(2, 10, 40).sum((1, 2))
    expected = {"mlp": channels, "attention": groups / (2 * 20 * 40 + 2 * 10 * 40)}
    for threads in (1, 3):
        for family, scores in zip(members, family_scores(members, source, threads), strict=True):
            if family.block == 1:
                assert np.allclose(scores, expected[family.kind])


def test_every_expert_has_channels_of_its_own(monkeypatch):
    from sparse_ft.pruning import sources

    monkeypatch.setattr(sources, "PART", 17)  # several parts a tensor
    config = {"model_type": "mixtral", "num_attention_heads": 1, "num_key_value_heads": 1}
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": torch.rand(shape, generator=generator)
        for expert in range(3)
        for name, shape in (("w1", (5, 4)), ("w2", (4, 5)), ("w3", (5, 4)))
    }
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    members = families(config, shapes)
    assert [(family.units, family.unit_weights, family.routed) for family in members] == [(5, 12, True)] * 3
    scores = family_scores(members, ScoreSource(shapes, lambda name: weights[name].numpy()))
    for expert, values in enumerate(scores):
        gate, down, up = list(weights.values())[3 * expert :][:3]
        assert np.allclose(values, (gate.sum(1) + up.sum(1) + down.sum(0)) / 12)


@pytest.mark.parametrize(
    ("groups", "group_weights", "channels", "channel_weights", "together"),
    [(3, 294912, 1536, 1728, 1), (32, 2097152, 11008, 12288, 1), (8, 5242880, 14336, 98304, 8), (1, 100, 64, 10, 8)],
)
def test_counts_grow_and_stay_near_the_level(groups, group_weights, channels, channel_weights, together):
    total = groups * group_weights + channels * channel_weights
    before = (0, 0)
    for level in np.linspace(0, 1, 401):
        head, (channel,) = block_counts(level, groups, group_weights, [Channels(channels, channel_weights, together)])
        gone = head, channel
        assert gone[0] >= before[0]
        assert gone[1] >= before[1]
        pruned = gone[0] * group_weights + gone[1] * channel_weights
        if level < 1:
            assert gone[0] < groups
            assert gone[1] < channels
            most = (groups - 1) * group_weights + (channels - together) * channel_weights
            low = min(level * total, most) - together * channel_weights
            assert low <= pruned <= level * total + group_weights + together * channel_weights
        assert gone[1] % together == 0
        before = gone
    assert before == (groups, channels)
    assert block_counts(0.0, groups, group_weights, [Channels(channels, channel_weights, together)]) == (0, (0,))


def test_half_of_a_model_with_three_groups_is_half():
    groups, (channels,) = block_counts(0.5, 3, 294912, [Channels(1536, 1728)])
    pruned = groups * 294912 + channels * 1728
    assert pruned == pytest.approx(0.5 * (3 * 294912 + 1536 * 1728), abs=1728 / 2)


def test_one_ranking_takes_the_lowest_units_of_the_model(tiny_model):
    checkpoint = Checkpoint(tiny_model("tiny-llama"))
    members = families(checkpoint.config, checkpoint.prunable_shapes())
    random = np.random.default_rng(0)
    scores = [random.random(family.units) for family in members]
    levels = [0.0, 0.2, 0.6, 1.0]
    kept = choose_units(members, scores, levels, "global")
    before = None
    for level, choice in zip(levels, kept, strict=True):
        stay = np.concatenate([s[k] for s, k in zip(scores, choice, strict=True)] or [[]])
        gone = np.concatenate([s[~k] for s, k in zip(scores, choice, strict=True)])
        assert not (stay.size and gone.size) or gone.max() < stay.min()
        weights = sum(f.unit_weights * int((~k).sum()) for f, k in zip(members, choice, strict=True))
        total = sum(f.units * f.unit_weights for f in members)
        assert abs(weights - level * total) <= max(f.unit_weights for f in members) / 2
        if before is not None:
            assert all(not (k & ~b).any() for k, b in zip(choice, before, strict=True))
        before = choice
