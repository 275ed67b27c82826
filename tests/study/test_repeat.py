"""The command on a cell's run gives that cell again, alone."""

import shlex

import pytest

from sparse_ft.commands.train import train
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import TrainConfig
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.settings.parser import Parser
from sparse_ft.study.driver import sweep
from sparse_ft.tracking.runs import Tracker


def again(run, folder, leave_out=""):
    """The run of a cell's command, but for one flag."""
    words = [word for word in shlex.split(run.tags["command"])[2:] if not leave_out or leave_out not in word]
    assert train(Parser(TrainConfig).arguments([*words, f"--output_dir={folder}"])) == 0
    return max(Tracker().search(), key=lambda found: found.start_time)


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["wanda", "sparsegpt"])
def test_a_level_above_others_has_the_masks_that_it_had_among_them(study_file, tmp_path, importance):
    """What a rule that reads text prunes at a level goes at every higher one: alone it would choose other weights."""
    cell = {"calibration_samples": 4, "calibration_seq_len": 64, "scope": "row" if importance == "wanda" else "layer"}
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.45, 0.6], "importance": [importance]}
    path = study_file(grid, cell=cell, dense_baseline=False)
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    low, _, high = sorted(
        (run for run in Tracker().search() if run.kind == "cell"), key=lambda run: run.metrics["sparsity/target"]
    )
    assert "mask_levels" not in low.tags["command"] and "--mask_levels=0.3,0.45" in high.tags["command"]
    same, other = again(high, tmp_path / "same"), again(high, tmp_path / "other", leave_out="mask_levels")
    for name in ("mask_checksum", "cell_key", "merged_fingerprint"):
        assert same.tags[name] == high.tags[name] != other.tags[name]
    assert same.metrics["eval/loss"] == high.metrics["eval/loss"] != other.metrics["eval/loss"]
    assert same.tags["command"].replace(f" --output_dir={tmp_path}/same", "") == high.tags["command"]


def test_levels_of_no_use_are_one_line():
    for values, said in (
        ({"mask_levels": (0.7,), "sparsity": 0.5}, "depend on lower levels only"),
        ({"mask_levels": (0.3,), "mode": "dense"}, "nothing is pruned"),
    ):
        with pytest.raises(UserError, match=said):
            TrainConfig(**values).check()
    with pytest.raises(UserError, match="mask_levels is 'many'"):
        Parser(TrainConfig).arguments(["--mask_levels", "many"])
