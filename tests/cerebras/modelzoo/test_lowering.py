"""Lowering for a wafer without a wafer: the part of the compiler that runs on the user's side."""

import re
from collections import Counter

import pytest

from sparse_ft.cerebras.checkpoint import ModelZooMasks
from sparse_ft.models.checkpoint import Checkpoint

MODES = ("dense", "sparse_to_dense", "sparse_to_sparse", "full")


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lowers_with_the_sparsity_that_was_measured(mode, kind, models, data, tmp_path, cszoo, zoo):
    config_file, masks, _ = zoo.prepare(models(kind), data, tmp_path, mode, device="CSX", steps=2)
    log = cszoo("fit", config_file, "--target_device", "CSX", "--validate_only")
    assert "Compile validated locally" in log
    # The folder of the run is there once more as the link "latest".
    programs = (tmp_path / "model_dir").glob("cerebras_logs/*/executors/*/cirh.mlir")
    (program,) = {path.resolve() for path in programs}
    announced = {float(value) for value in re.findall(r"\bsparsity = ([\d.e+-]+)", program.read_text())}
    if mode == "dense":
        assert not announced
        return
    by_name = ModelZooMasks(Checkpoint(models(kind)).config, masks)
    measured = Counter(by_name.sparsity(name) for name in by_name)
    assert len(announced) == len(measured)
    for found, expected in zip(sorted(announced), sorted(measured), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
