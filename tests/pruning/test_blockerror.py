"""A block's error, measured while blocks are pruned, against the formula on whole models in memory."""

import shutil

import pytest
import torch
from blockwise import generate
from safetensors.torch import load_file, save_file

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.loading import apply_masks, load_model
from sparse_ft.progress import Progress
from sparse_ft.pruning import blockerror
from sparse_ft.pruning.blockerror import output_error


class Measured(Progress):
    """Keeps what is measured, and how many samples had been worked on by then."""

    def __init__(self):
        self.points, self.at, self._done = {}, [], 0

    def advance(self, amount=1, note=""):
        self._done += amount

    def measured(self, step, values):
        self.at.append(self._done)
        for name, value in values.items():
            self.points.setdefault(name, []).append((step, value))


@torch.no_grad()
def direct(folder, pruned, text):
    """||f_pruned(x) - f(x)||^2 / ||f(x) - x||^2 of every block, x what the blocks pruned before it give out."""
    dense, row = load_model(folder, "float32", "cpu"), architecture_of(Checkpoint(folder).config)
    errors = []

    def compare(original):
        def hook(module, arguments, keywords, output):
            inputs, new = arguments[0], output[0] if isinstance(output, tuple) else output
            old = original(*arguments, **keywords)
            old = old[0] if isinstance(old, tuple) else old
            apart, added = ((a - b).double().norm() ** 2 for a, b in ((new, old), (old, inputs)))
            errors.append(float(apart / added))

        return hook

    for block, original in zip(pruned.get_submodule(row.blocks), dense.get_submodule(row.blocks), strict=True):
        block.register_forward_hook(compare(original), with_kwargs=True)
    pruned(input_ids=text, use_cache=False)
    return errors


def _pruned(folder, result):
    model = load_model(result.checkpoint or folder, "float32", "cpu")
    apply_masks(model, result.load())
    return model


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mixtral"])
@pytest.mark.parametrize(
    "how",
    [
        {"importance": "wanda", "scope": "row"},
        {"importance": "wanda", "method": "structured"},
        {"importance": "sparsegpt"},
        {"importance": "alps"},
        {"importance": "magnitude", "refine": "swaps"},
        {"importance": "wanda", "scope": "row", "update": "refit", "reconstruct": "block"},
    ],
    ids=lambda how: "-".join(how.values()),
)
def test_it_is_the_direct_formula_and_known_at_each_block(tiny_model, text, tmp_path, kind, how):
    folder, shown = tiny_model(kind), Measured()
    _, results = generate(folder, text, tmp_path, shown, sparsities=(0.0, 0.4, 0.7), **how)
    for result, level in zip(results, ("0", "40", "70"), strict=True):
        errors = result.load().metadata["block_errors"]
        assert errors == pytest.approx(direct(folder, _pruned(folder, result), text), rel=2e-3)
        assert shown.points[f"prune/block_error_{level}"] == list(enumerate(errors, 1))
        assert all(error < 1e-3 if level == "0" else 1e-3 < error < 2 for error in errors)
    assert shown.at == sorted(shown.at) and shown.at[-1] > shown.at[3] > shown.at[0]  # three levels, then block 2


def test_of_a_long_text_it_is_that_of_the_first_samples(tiny_model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(blockerror, "_TOKENS", 3 * text.shape[1] + 1)
    folder = tiny_model("tiny-llama")
    _, (result,) = generate(folder, text, tmp_path, importance="wanda", scope="row", sparsities=(0.5,))
    whole, first = (direct(folder, _pruned(folder, result), some) for some in (text, text[:3]))
    assert len(text) > 3 and result.metadata["block_errors"] == pytest.approx(first, rel=2e-3)
    assert result.metadata["block_errors"] != pytest.approx(whole, rel=2e-3)


def test_what_is_not_finite_is_no_number_of_the_masks(tiny_model, text, tmp_path):
    folder, shown = shutil.copytree(tiny_model("tiny-llama"), tmp_path / "model"), Measured()
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for projection in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{projection}.weight"] *= 1e22  # their outputs' product is beyond every float32
    save_file(tensors, file, {"format": "pt"})
    how = {"importance": lambda weight, statistics: weight.abs(), "statistics": "activations", "scope": "row"}
    _, (result,) = generate(folder, text, tmp_path / "masks", shown, sparsities=(0.5,), **how)
    first, last = result.load().metadata["block_errors"]
    assert 0 < first < 2 and last is None


def test_a_block_that_is_left_out_has_the_error_one():
    inputs, added = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    apart, base = output_error(inputs, inputs + added, inputs)
    assert apart == base == pytest.approx(float(added.double().square().sum()), rel=1e-5)
    assert output_error(inputs, inputs + added, inputs + added)[0] == 0
