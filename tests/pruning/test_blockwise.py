"""Block-sequential pruning against the same thing done to a whole model in memory."""

import pytest
import torch
from blockwise import (
    agreement,
    generate,
    in_memory,
    layers_of_alps,
    layers_of_sparsegpt,
    rows_of_wanda,
    rows_of_wanda_and_swaps,
)

from sparse_ft.models.blocks import InputWatch
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_model
from sparse_ft.progress import Progress
from sparse_ft.pruning import PruningSettings


@pytest.mark.parametrize(("refine", "rule"), [("none", rows_of_wanda), ("swaps", rows_of_wanda_and_swaps)])
def test_wanda_is_the_dense_formula(tiny_model, text, tmp_path, refine, rule):
    folder, how = tiny_model("tiny-llama"), {"importance": "wanda", "scope": "row", "sparsities": (0.5,)}
    _, (result,) = generate(folder, text, tmp_path, refine=refine, **how)
    masks, (_, oracle) = result.load(), in_memory(folder, text, rule(0.5))
    assert set(masks) == set(oracle)
    assert agreement(masks, oracle) > 0.9995  # two sums of float32 may order a near tie otherwise
    assert result.checkpoint is None and result.metadata.get("refine", "none") == refine


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mixtral"])
@pytest.mark.parametrize(
    "how",
    [
        {"importance": "magnitude"},
        {"importance": "magnitude", "scope": "row"},
        {"importance": "taylor"},
        {"importance": "wanda", "scope": "row"},
        {"importance": "wanda", "method": "semi_structured"},
        {"importance": "magnitude", "method": "semi_structured"},
    ],
    ids=lambda how: "-".join(how.values()),
)
def test_swaps_keep_the_count_of_every_row_and_group(tiny_model, text, tmp_path, kind, how):
    folder = tiny_model(kind)
    _, (plain,) = generate(folder, text, tmp_path / "plain", **how)
    _, (better,) = generate(folder, text, tmp_path / "better", refine="swaps", **how)
    before, after = plain.load(), better.load()
    moved = 0
    for name in before:
        # What goes into the first block hangs on no mask: there the masks before the swaps are the same.
        if ".layers.0." in name or how["importance"] != "wanda":
            assert torch.equal(before[name].sum(-1), after[name].sum(-1))
            moved += int((before[name] != after[name]).sum())
        if how.get("method") == "semi_structured":
            assert (after[name].view(-1, 4).sum(1) == 2).all()
    assert moved > 0 and before.n_pruned == after.n_pruned
    assert before.checksum != after.checksum and plain.checkpoint is better.checkpoint is None


def test_the_errors_of_bettered_masks_are_smaller(tiny_model, text, tmp_path):
    """Of the first block's matrices, row by row, on the inputs that both masks were made on."""
    folder, how = tiny_model("tiny-llama"), {"importance": "magnitude", "sparsities": (0.3, 0.6)}
    _, plain = generate(folder, text, tmp_path / "plain", **how)
    _, better = generate(folder, text, tmp_path / "better", refine="swaps", **how)
    grams, checkpoint = {}, Checkpoint(folder)

    def watch(weight, x):
        grams[weight.data_ptr()] = x.T @ x
        return weight, torch.ones_like(weight, dtype=torch.bool)

    model, _ = in_memory(folder, text, watch)
    for name in (n for n in checkpoint.prunable if ".layers.0." in n):
        gram, weight = grams[model.get_parameter(name).data_ptr()], checkpoint.tensor(name).float()
        for one, other in zip(plain, better, strict=True):
            lost, less = (weight * ~result.load()[name] for result in (one, other))
            errors = [((values @ gram) * values).sum(1) for values in (lost, less)]
            assert errors[1].sum() < 0.95 * errors[0].sum(), name
            if one is plain[0]:  # above, the mask of the level below has changed where a row begins
                assert (errors[1] <= errors[0] * (1 + 1e-5)).all(), name


@pytest.mark.parametrize(("importance", "rule"), [("sparsegpt", layers_of_sparsegpt), ("alps", layers_of_alps)])
def test_what_chooses_and_updates_changes_the_weights_as_in_memory(tiny_model, text, tmp_path, importance, rule):
    folder = tiny_model("tiny-mistral")
    _, (result,) = generate(folder, text, tmp_path, importance=importance, sparsities=(0.5,))
    whole, oracle = in_memory(folder, text, rule(0.5))
    masks = result.load()
    assert agreement(masks, oracle) > 0.999
    pruned = load_model(result.checkpoint, "float32", "cpu")
    for name, mask in masks.items():
        weight = pruned.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight - whole.get_parameter(name)).norm() < 0.05 * weight.norm()
    before = {name: weight.clone() for name, weight in pruned.named_parameters()}
    apply_masks(pruned, masks)
    assert all(torch.equal(weight, before[name]) for name, weight in pruned.named_parameters())


def test_the_pruned_checkpoint_is_what_the_masks_belong_to(tiny_model, text, tmp_path):
    folder = tiny_model("tiny-mixtral")
    _, results = generate(folder, text, tmp_path, importance="sparsegpt", sparsities=(0.3, 0.6))
    for result in results:
        about = result.load().metadata
        assert about["fingerprint"] == Checkpoint(result.checkpoint).fingerprint != about["source_fingerprint"]
        assert about["source_fingerprint"] == Checkpoint(folder).fingerprint
    assert results[0].checkpoint != results[1].checkpoint


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mixtral"])
@pytest.mark.parametrize(
    "how",
    [
        {"importance": "wanda", "scope": "row"},
        {"importance": "wanda", "scope": "layer"},
        {"importance": "wanda", "scope": "global", "force": True},
        {"importance": "wanda", "method": "structured"},
        {"importance": "sparsegpt"},
        {"importance": "sparsegpt", "allocation": "owl"},
        {"importance": "alps"},
        {"importance": "alps", "allocation": "owl"},
        {"importance": "wanda", "allocation": "owl", "scope": "layer"},
        {"importance": "wanda", "allocation": "dlp", "scope": "row"},
        {"importance": "magnitude", "allocation": "dlp", "update": "refit"},
        {"importance": "alps", "allocation": "dlp"},
        {"importance": "wanda", "scope": "row", "refine": "swaps"},
        {"importance": "wanda", "allocation": "owl", "scope": "row", "refine": "swaps"},
        {"importance": "magnitude", "scope": "layer", "refine": "swaps"},
        {"importance": "magnitude", "scope": "row", "refine": "swaps", "update": "refit"},
        {"importance": "sparsegpt", "update": "none", "refine": "swaps"},
        {"importance": "taylor", "scope": "global"},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_levels_are_nested_and_exact(tiny_model, text, tmp_path, kind, how):
    levels = (0.0, 0.5, 0.51, 1.0)
    _, results = generate(tiny_model(kind), text, tmp_path, sparsities=levels, **how)
    previous = None
    for level, result in zip(levels, results, strict=True):
        masks = result.load()
        if "allocation" in how or how.get("scope") == "global":
            assert masks.n_pruned == round(level * masks.n_weights)
        elif how.get("method") == "structured":
            assert masks.sparsity == pytest.approx(level, abs=0.2)
        else:
            for name in masks:
                per = masks.shapes[name][-1] if how.get("scope") == "row" else masks.weights(name)
                count = masks.weights(name) // per * round(level * per)
                assert masks.weights(name) - masks.kept(name) == count
        if previous is not None:
            assert not any((masks[name] & ~previous[name]).any() for name in masks)
        previous = masks
    assert not list(tmp_path.glob(".*"))  # no state, and no masks before they were bettered


def direct_owl(scores):
    share = [float((block > 5 * block.mean()).double().mean()) for block in scores]
    return torch.tensor(share, dtype=torch.float64), 0.08


def direct_dlp(scores):
    medians = torch.tensor([float(block.median()) for block in scores], dtype=torch.float64)
    return 1 - medians / medians.sum(), 0.15


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mistral"])
@pytest.mark.parametrize(("allocation", "direct"), [("owl", direct_owl), ("dlp", direct_dlp)])
def test_blocks_are_as_dense_as_the_papers_formula_says(tiny_model, text, tmp_path, kind, allocation, direct):
    folder, scores = tiny_model(kind), []

    def watch(weight, x):
        scores.append((weight.abs() * x.norm(dim=0)).flatten())
        return weight, torch.ones_like(weight, dtype=torch.bool)

    _, whole = in_memory(folder, text, watch)
    blocks = sorted({name.split(".")[2] for name in whole}, key=int)
    of = [torch.cat([s for s, n in zip(scores, whole, strict=True) if n.split(".")[2] == block]) for block in blocks]
    figures, spread = direct(of)
    scaled = (figures - figures.min()) / (figures.max() - figures.min()) * 2 * spread
    expected = 0.6 - (scaled - scaled.mean())  # blocks are of one size, and nothing is clipped
    _, (result,) = generate(folder, text, tmp_path, allocation=allocation, sparsities=(0.6,))
    masks = result.load()
    for block, sparsity in zip(blocks, expected.tolist(), strict=True):
        names = [name for name in masks if name.split(".")[2] == block]
        pruned = sum(int((~masks[name]).sum()) for name in names)
        assert pruned == pytest.approx(sparsity * sum(masks.weights(name) for name in names), abs=len(names))
    assert masks.n_pruned == round(0.6 * masks.n_weights) and result.metadata["allocation"] == allocation
    assert len(set(expected.tolist())) == len(blocks) > 1


class Killed(BaseException):
    pass


class KillAfter(Progress):
    """Ends the run when the second block begins, and counts what was done."""

    def __init__(self, kill):
        self.kill, self.done = kill, 0.0

    def start(self, stage, total, unit=""):
        self.stage = stage

    def advance(self, amount=1, note=""):
        if self.stage == "prune blocks":
            self.done += amount
            if self.kill and note.startswith("block 2"):
                raise Killed


@pytest.mark.parametrize(
    "how",
    [
        {"importance": "wanda"},
        {"importance": "sparsegpt"},
        {"importance": "alps"},
        {"importance": "magnitude", "update": "refit"},
        {"importance": "magnitude", "refine": "swaps"},
        {"importance": "wanda", "update": "refit", "reconstruct": "block"},
    ],
    ids=lambda how: "-".join(how.values()),
)
def test_a_killed_run_goes_on_at_its_block(tiny_model, text, tmp_path, how):
    folder, how = tiny_model("tiny-llama"), how | {"sparsities": (0.4, 0.7)}
    _, whole = generate(folder, text, tmp_path / "whole", **how)
    with pytest.raises(Killed):
        generate(folder, text, tmp_path / "killed", KillAfter(True), **how)
    (state,) = (tmp_path / "killed").glob(".blocks-*")
    assert not list((tmp_path / "killed").glob("masks*"))
    seen = []

    class Watching(KillAfter):
        def advance(self, amount=1, note=""):
            super().advance(amount, note)
            if note:
                seen.append(note)

    _, resumed = generate(folder, text, tmp_path / "killed", Watching(False), **how)
    assert set(seen) == {"block 2 of 2"}
    assert [result.checksum for result in resumed] == [result.checksum for result in whole]
    for left, right in zip(resumed, whole, strict=True):
        masks_alone = not PruningSettings(**how).changes_weights
        assert (left.checkpoint is None) == (right.checkpoint is None) == masks_alone
        if left.checkpoint is not None:
            assert Checkpoint(left.checkpoint).fingerprint == Checkpoint(right.checkpoint).fingerprint
        for measured in ("block_errors", "reconstruction"):
            assert left.metadata.get(measured) == right.metadata.get(measured)
    assert not state.exists()


def test_other_text_does_not_resume(tiny_model, text, tmp_path):
    folder, how = tiny_model("tiny-llama"), {"importance": "wanda"}
    with pytest.raises(Killed):
        generate(folder, text, tmp_path, KillAfter(True), **how)
    other = KillAfter(False)
    generate(folder, text.flip(0), tmp_path, other, **how)
    assert other.done == 2 * 2 * len(text)  # both blocks, in and out


def test_an_expert_without_tokens_is_said(tiny_model, tmp_path):
    text = torch.full((1, 3), 7)  # one token visits 2 of 4 experts
    for importance, update in (
        ("wanda", "auto"),
        ("sparsegpt", "auto"),
        ("alps", "auto"),
        ("wanda", "refit"),
        ("magnitude", "refit"),
        ("magnitude", "swaps"),
    ):
        said = []
        progress = Progress()
        progress.say = said.append
        how = {"importance": importance, "refine" if update == "swaps" else "update": update}
        out = tmp_path / f"{importance}-{update}"
        generator, (result,) = generate(tiny_model("tiny-mixtral"), text, out, progress, **how)
        assert said == generator.notes
        assert any("no calibration token came here" in note for note in generator.notes)
        assert result.load().metadata["notes"] == generator.notes[:20]
        if update == "refit" or importance == "alps":  # of an expert that they reach in the first block
            assert any(
                "layers.0.block_sparse_moe" in note
                and note.endswith("3 tokens reached its 40 inputs; damped with 0.133")
                for note in generator.notes
            )


def test_more_damping_is_said(tiny_model, text, tmp_path, monkeypatch):
    def hardly_positive(watch, name):  # a Hessian as rounding leaves it, with negative eigenvalues
        whole = hessian(watch, name)
        mean, eye = whole.diagonal().mean(), torch.eye(len(whole))
        return whole - (torch.linalg.eigvalsh(whole).min() + 0.05 * mean) * eye

    hessian = InputWatch.hessian
    monkeypatch.setattr(InputWatch, "hessian", hardly_positive)
    generator, (result,) = generate(tiny_model("tiny-llama"), text, tmp_path, importance="sparsegpt")
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"{name}: Cholesky failed with damping 0.01 and passed with 0.1" in generator.notes
    assert result.load().metadata["notes"] == generator.notes[:20]


def test_a_users_own_importance_sees_activations(tiny_model, text, tmp_path):
    names = []

    def mine(weight, statistics):
        names.append((statistics.name, statistics.tokens))
        return weight.abs() * statistics.input_norm

    folder = tiny_model("tiny-llama")
    _, (own,) = generate(folder, text, tmp_path / "a", importance=mine, statistics="activations", scope="row")
    _, (wanda,) = generate(folder, text, tmp_path / "b", importance="wanda", scope="row")
    assert own.checksum == wanda.checksum
    assert own.load().metadata["importance"] == "mine"
    assert {tokens for _, tokens in names} == {text.numel()}
    assert sorted({name for name, _ in names}) == Checkpoint(folder).prunable
