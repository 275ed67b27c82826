import numpy as np
import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning import sources
from sparse_ft.pruning.sources import MagnitudeSource, RandomSource, ScoreSource, ordered_keys

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def joined(source, name, **how):
    return np.concatenate([part.copy() for part in source.parts(name, **how)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widen", [False, True])
def test_keys_are_in_the_order_of_magnitudes(write_llama, dtype, widen, monkeypatch):
    monkeypatch.setattr(sources, "PART", 100)
    folder, tensors = write_llama(dtype=dtype)
    source = MagnitudeSource(Checkpoint(folder), ["model.layers.0.mlp.down_proj.weight"])
    (name,) = source.shapes
    keys = torch.from_numpy(joined(source, name, widen=widen).astype(np.int64)).flatten()
    magnitudes = tensors[name].abs().flatten()
    assert torch.equal(keys.argsort(stable=True), magnitudes.argsort(stable=True))
    assert len(keys.unique()) == len(magnitudes.unique())
    scores = np.concatenate([part.copy() for part in source.scores(name)])
    assert torch.equal(torch.from_numpy(scores), tensors[name].abs().float())


def test_widened_keys_compare_across_dtypes(write_llama):
    folder, tensors = write_llama(mixed=True)
    checkpoint = Checkpoint(folder)
    source = MagnitudeSource(checkpoint, checkpoint.prunable)
    keys = np.concatenate([joined(source, name, widen=True).reshape(-1) for name in checkpoint.prunable])
    magnitudes = torch.cat([tensors[name].float().abs().flatten() for name in checkpoint.prunable])
    assert len({checkpoint.dtype(name) for name in checkpoint.prunable}) == 3
    assert np.array_equal(np.argsort(keys, kind="stable"), magnitudes.argsort(stable=True).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_without_order_are_named(write_llama, dtype, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    folder, tensors = write_llama(dtype=dtype)
    tensors[name][5, 3] = bad
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}.*NaN or infinite"):
        list(MagnitudeSource(Checkpoint(folder), [name]).parts(name))


def test_other_dtypes_are_refused_before_reading(write_llama):
    folder, _ = write_llama(dtype=torch.float64)
    checkpoint = Checkpoint(folder)
    with pytest.raises(UserError, match=r"q_proj.*float64|down_proj.*float64"):
        MagnitudeSource(checkpoint, checkpoint.prunable)


def test_ordered_keys_follow_the_numbers():
    scores = np.array([-np.float32(3e38), -1.0, -1e-40, -0.0, 0.0, 1e-40, 2.5, 3e38], np.float32)
    keys = ordered_keys(scores)
    assert keys[3] == keys[4]
    assert np.array_equal(np.argsort(keys, kind="stable"), np.arange(8))


def test_random_keys_depend_on_seed_name_and_position_alone(monkeypatch):
    shapes = {"a": (6, 50), "b": (6, 50)}
    whole = RandomSource(shapes, 1)
    first = {name: joined(whole, name) for name in shapes}
    monkeypatch.setattr(sources, "PART", 60)
    assert np.array_equal(first["b"], joined(RandomSource({"b": (6, 50)}, 1), "b"))
    assert not np.array_equal(first["a"], first["b"])
    assert not np.array_equal(first["a"], joined(RandomSource(shapes, 2), "a"))


def test_scores_must_be_finite_and_fit():
    source = ScoreSource({"a": (2, 2)}, lambda name: np.array([[1, np.nan], [0, 1]], np.float32))
    with pytest.raises(UserError, match=r"a: .*NaN"):
        list(source.parts("a"))
    with pytest.raises(ValueError, match="not float32"):
        list(ScoreSource({"a": (2, 3)}, lambda name: np.zeros((2, 2), np.float32)).parts("a"))


def test_a_file_that_shrinks_under_the_reader_is_an_error(write_llama):
    folder, _ = write_llama()
    checkpoint = Checkpoint(folder)
    name = max(checkpoint.prunable, key=checkpoint.offset)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(checkpoint.offset(name) + 10)
    with pytest.raises(UserError, match="truncated"):
        list(MagnitudeSource(checkpoint, [name]).parts(name))
