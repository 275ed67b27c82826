"""Masks that are brought as a file say of a cell what made them."""

import json
from dataclasses import replace

import pytest

from sparse_ft.cell.masks import make_masks, mask_file
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.tasks.corpora import drawn_windows

TEXT = {"data_dir": "made", "calibration_samples": 4, "calibration_seq_len": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Magnitude's masks as they are, with SparseGPT's update, bettered by swaps, and with tuned blocks."""
    folder, bench = tmp_path_factory.mktemp("masks"), Workbench()
    asked = MaskConfig(model="tiny-llama", **TEXT)
    kinds = {
        "tuned": {"reconstruct": "block", "reconstruct_epochs": 1},
        "none": {},
        "sparsegpt": {"update": "sparsegpt"},
        "swaps": {"refine": "swaps"},
    }
    return {
        name: mask_file(make_masks(replace(asked, **how), bench, folder / name)[0].path) for name, how in kinds.items()
    }


def test_a_file_says_what_made_it_whatever_stands_beside_its_name(files):
    cell = CellConfig(model="tiny-llama", importance="wanda", scope="row", sparsity=0.9)
    plain, updated = (files[update].settle(cell) for update in ("none", "sparsegpt"))
    assert plain.title == "50 % s2s unstructured magnitude · boolq · tiny-llama"
    assert updated.title == "50 % s2s unstructured magnitude+sparsegpt · boolq · tiny-llama"
    assert (plain.importance, plain.scope, plain.sparsity) == ("magnitude", "layer", 0.5)
    assert plain.key() != updated.key()


@pytest.mark.parametrize(
    ("of_file", "asked"), [("none", "sparsegpt"), ("none", "refit"), ("sparsegpt", "none"), ("sparsegpt", "refit")]
)
def test_an_update_that_a_file_did_not_have_is_refused_and_not_passed_over(files, of_file, asked):
    cell = CellConfig(model="tiny-llama", masks=str(files[of_file].file.path), update=asked)
    with pytest.raises(UserError, match=f"update is {asked}, and the masks .* were made with update {of_file}"):
        files[of_file].settle(cell)
    assert files[of_file].settle(replace(cell, update=of_file)) == files[of_file].settle(replace(cell, update="auto"))


def test_a_refinement_that_a_file_did_not_have_is_refused_and_not_passed_over(files):
    cell = CellConfig(model="tiny-llama", masks=str(files["none"].file.path), refine="swaps")
    with pytest.raises(UserError, match=r"refine is swaps, and the masks .* were made with refine none"):
        files["none"].settle(cell)
    settled = files["swaps"].settle(cell)
    assert settled.title == "50 % s2s unstructured magnitude+swaps · boolq · tiny-llama"
    assert settled == files["swaps"].settle(replace(cell, refine="none"))


def test_a_file_says_how_its_blocks_were_tuned(files):
    settled = files["tuned"].settle(CellConfig(model="tiny-llama", reconstruct="block", reconstruct_epochs=7))
    assert (settled.reconstruct, settled.reconstruct_epochs, settled.reconstruct_batch) == ("block", 1, 2)
    with pytest.raises(UserError, match=r"reconstruct is block, and the masks .* were made with reconstruct none"):
        files["none"].settle(CellConfig(model="tiny-llama", reconstruct="block"))


def test_masks_calibrated_on_a_corpus_are_one_set_for_all_tasks_and_say_so(tmp_path):
    corpora = tmp_path / "data" / "corpora"
    corpora.mkdir(parents=True)
    (corpora / "c4.jsonl").write_text(json.dumps({"text": "The sea is deep, and the river runs to it. " * 20}))
    cell = CellConfig(
        model="tiny-llama", importance="wanda", scope="row", **TEXT | {"data_dir": str(tmp_path / "data")}
    )
    sets = [mask_set_of(replace(cell, task=task, calibration_corpus="c4")) for task in ("boolq", "hellaswag")]
    assert sets[0] == sets[1] and mask_set_of(cell) != mask_set_of(replace(cell, task="hellaswag"))
    bench = Workbench()
    (made,) = make_masks(replace(sets[0], sparsities=(0.5,)), bench, tmp_path / "masks")
    about = made.metadata["calibration"]
    assert (about["corpus"], about["samples"], about["length"]) == ("c4", 4, 16) and "task" not in about
    tokens = drawn_windows(bench.corpus("c4", sets[0].data_dir), bench.tokenizer("tiny-llama"), 4, 16, 0)
    folder = bench.checkpoint("tiny-llama").folder
    settings = PruningSettings(importance="wanda", scope="row", dtype="float32")
    (same,) = MaskGenerator(folder, settings, Calibration(tokens)).generate(tmp_path / "again", figures="none")
    assert same.checksum == made.checksum
    assert mask_file(made.path).settle(cell).calibration_corpus == "c4"
