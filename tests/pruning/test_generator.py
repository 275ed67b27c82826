import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_ft import __version__
from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.files import load_masks
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings

KINDS = ["tiny-llama", "tiny-mistral", "tiny-mixtral"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_magnitude_masks_of_built_in_models(tiny_model, lowest, tmp_path, kind, scope):
    checkpoint = Checkpoint(tiny_model(kind))
    settings = PruningSettings(scope=scope, sparsities=(0.7, 0.0, 0.5, 1.0))
    results = MaskGenerator(checkpoint.folder, settings).generate(tmp_path, figures="none")
    assert [result.sparsity for result in results] == [0.0, 0.5, 0.7, 1.0]
    for result in results:
        masks = result.load()
        check_masks(masks, checkpoint.prunable_shapes())
        assert (result.weights, result.pruned) == (masks.n_weights, masks.n_pruned)
        assert result.achieved == masks.sparsity
        if scope == "layer":
            for name in masks:
                weight = checkpoint.tensor(name).float().abs()
                assert torch.equal(masks[name], lowest(weight, round(result.sparsity * weight.numel())))
        elif scope == "global":
            assert masks.n_pruned == round(result.sparsity * masks.n_weights)


def test_files_of_a_level(tiny_model, tmp_path):
    folder = tiny_model("tiny-mixtral")
    settings = PruningSettings(scope="global", sparsities=(0.5, 0.125), seed=3)
    results = MaskGenerator(folder, settings, model_name="tiny").generate(tmp_path, figures="all")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "coverage.json",
        "heatmap_sparsity12.5_unstructured.png",
        "heatmap_sparsity50_unstructured.png",
        "histogram_sparsity12.5_unstructured.png",
        "histogram_sparsity50_unstructured.png",
        "masks_sparsity12.5_unstructured.safetensors",
        "masks_sparsity50_unstructured.safetensors",
        "stats_sparsity12.5_unstructured.json",
        "stats_sparsity50_unstructured.json",
        "summary_unstructured.png",
    ]
    half = results[1]
    assert half.path == tmp_path / "masks_sparsity50_unstructured.safetensors"
    assert (
        half.load().metadata
        == half.metadata
        == {
            "method": "unstructured",
            "importance": "magnitude",
            "scope": "global",
            "sparsity": 0.5,
            "achieved": half.achieved,
            "model": "tiny",
            "fingerprint": Checkpoint(folder).fingerprint,
            "calibration": None,
            "seed": 3,
            "version": __version__,
            "levels": [0.125, 0.5],
        }
    )
    numbers = json.loads(half.statistics.read_text())
    assert numbers["pruned"] == half.pruned
    assert numbers["checksum"] == half.checksum
    assert {path.read_bytes()[:4] for path in (half.histogram, half.heatmap, half.summary)} == {b"\x89PNG"}


def test_figures_are_drawn_on_demand(tiny_model, tmp_path):
    generator = MaskGenerator(tiny_model("tiny-llama"), PruningSettings(sparsities=(0.3, 0.6)))
    (first, second) = generator.generate(tmp_path / "summary")
    assert first.summary == second.summary == tmp_path / "summary" / "summary_unstructured.png"
    assert [path.name for path in (tmp_path / "summary").glob("*.png")] == ["summary_unstructured.png"]
    (none, _) = generator.generate(tmp_path / "none", figures="none")
    assert (none.summary, none.histogram, none.heatmap) == (None, None, None)
    assert not list((tmp_path / "none").glob("*.png"))


def test_coverage_says_what_was_left_and_why(tiny_model, tmp_path):
    folder = tiny_model("tiny-mixtral")
    MaskGenerator(folder, PruningSettings()).generate(tmp_path, figures="none")
    report = json.loads((tmp_path / "coverage.json").read_text())
    checkpoint = Checkpoint(folder)
    assert sorted(report["tensors_covered"]) == checkpoint.prunable
    left = report["tensors_left"]
    assert set(left) == {"embedding", "output head", "norm", "router"}
    assert left["router"]["names"] == [f"model.layers.{b}.block_sparse_moe.gate.weight" for b in range(2)]
    named = set(report["tensors_covered"]) | {name for entry in left.values() for name in entry["names"]}
    assert named == set(checkpoint.names)
    parameters = sum(checkpoint.tensor(name).numel() for name in checkpoint.names)
    assert report["parameters"] == parameters == report["prunable"] + sum(e["parameters"] for e in left.values())
    (level,) = report["levels"]
    assert level["pruned_fraction_of_all_parameters"] == level["pruned"] / parameters


@pytest.mark.parametrize("method", ["unstructured", "random", "structured", "semi_structured"])
def test_formats_and_threads_have_one_identity(tiny_model, tmp_path, method):
    checksums = set()
    for threads, kind in ((1, "safetensors"), (3, "npz"), (2, "pt")):
        settings = PruningSettings(method=method, threads=threads)
        (result,) = MaskGenerator(tiny_model("tiny-llama"), settings).generate(tmp_path, kind, figures="none")
        assert result.path.suffix == f".{kind}"
        checksums.add(load_masks(result.path).checksum)
        assert result.checksum in checksums
    assert len(checksums) == 1
    assert not list(tmp_path.glob(".*"))


def test_patterns_are_kept_everywhere(tiny_model, tmp_path):
    settings = PruningSettings(method="semi_structured", pattern="1:2")
    (result,) = MaskGenerator(tiny_model("tiny-llama"), settings).generate(tmp_path, figures="none")
    assert result.path.name == "masks_sparsity50_semi_structured_1of2.safetensors"
    assert result.metadata["pattern"] == "1:2"
    for mask in result.load().values():
        assert (mask.view(*mask.shape[:-1], -1, 2).sum(-1) == 1).all()


def test_patterns_that_do_not_fit_are_refused_before_reading(tiny_model):
    settings = PruningSettings(method="semi_structured", pattern="4:8")
    with pytest.raises(UserError, match="has 148 inputs, which groups of 8 do not divide"):
        MaskGenerator(tiny_model("tiny-llama"), settings)


def test_missing_text_is_said_before_reading(tiny_model):
    with pytest.raises(UserError, match="calibration text is needed"):
        MaskGenerator(tiny_model("tiny-llama"), PruningSettings(importance="wanda"))


def test_calibration_is_in_the_metadata(tiny_model, tmp_path, text):
    calibration = Calibration(text, {"task": "boolq", "seed": 7})
    settings = PruningSettings(importance="taylor", method="structured")
    (result,) = MaskGenerator(tiny_model("tiny-llama"), settings, calibration).generate(tmp_path, figures="none")
    assert result.metadata["calibration"] == {"task": "boolq", "seed": 7, "samples": 4, "length": 24}


def test_a_users_own_importance_needs_no_text(tiny_model, tmp_path):
    folder, results = tiny_model("tiny-llama"), []
    for index, importance in enumerate(("magnitude", lambda weight, statistics: weight.float() ** 2)):
        settings = PruningSettings(importance=importance, scope="global")
        results += MaskGenerator(folder, settings).generate(tmp_path / str(index), figures="none")
    assert results[0].checksum == results[1].checksum


@pytest.mark.parametrize(
    "how",
    [{}, {"method": "structured"}, {"scope": "row"}, {"importance": "wanda"}, {"importance": "taylor"}],
    ids=str,
)
def test_broken_weights_are_named_and_nothing_is_left(write_llama, tmp_path, text, how):
    name = "model.layers.0.mlp.gate_proj.weight"
    folder, tensors = write_llama()
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    out = tmp_path / "out"
    generator = MaskGenerator(folder, PruningSettings(**how), Calibration(text % 16))
    with pytest.raises(UserError, match=name):
        generator.generate(out, figures="none")
    assert not [path for path in out.glob("*") if path.is_file()]


def test_a_failed_run_leaves_the_old_files(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("tiny-llama")
    (old,) = MaskGenerator(folder, PruningSettings()).generate(tmp_path, figures="none")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    from sparse_ft.pruning import streaming

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(streaming, "_pack", full)
    with pytest.raises(OSError, match="disk full"):
        MaskGenerator(folder, PruningSettings(scope="global")).generate(tmp_path, figures="none")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_masks(old.path).checksum == old.checksum


def test_the_bits_are_where_others_look_for_them(tiny_model, tmp_path):
    (result,) = MaskGenerator(tiny_model("tiny-llama"), PruningSettings()).generate(tmp_path, figures="none")
    stored, masks = load_file(result.path), result.load()
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].shape == (60, 19)
    assert bool(stored[name][7, 2] >> 5 & 1) == bool(masks[name][7, 21])


def test_an_unknown_format_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="format 'csv' is none of"):
        MaskGenerator(tiny_model("tiny-llama"), PruningSettings()).generate(tmp_path, "csv")


@pytest.mark.parametrize("importance", ["magnitude", "wanda"])
@pytest.mark.parametrize("kind", KINDS)
def test_owl_by_rows_prunes_exactly_what_is_asked(tiny_model, tmp_path, text, kind, importance):
    """Rows of a tensor differ by one weight at most, and the whole is round(sparsity * n)."""
    levels = (0.3, 0.5, 0.777)
    settings = PruningSettings(
        sparsities=levels, scope="row", allocation="owl", importance=importance, dtype="float32", device="cpu"
    )
    generator = MaskGenerator(tiny_model(kind), settings, Calibration(text, {"task": "noise"}))
    files = generator.generate(tmp_path, figures="none")
    total = sum(torch.Size(shape).numel() for shape in generator.shapes.values())
    before = None
    for level, file in zip(levels, files, strict=True):
        masks = file.load()
        assert file.pruned == round(level * total)
        for name in masks.shapes:
            rows = (~masks[name]).flatten(0, -2).sum(-1)
            assert rows.max() - rows.min() <= 1
            assert before is None or not (masks[name] & ~before[name]).any()
        before = masks
