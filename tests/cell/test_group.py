"""Cells run by a group of two gloo processes: what one process makes of them, and what becomes of a lost member."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from sparse_ft.cell.failures import MemberLostError, classify
from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.modes import MODES

pytestmark = pytest.mark.slow

# Of this rank every adapter's shares are multiples of the 16 numbers that torch's fused AdamW takes at once on a CPU;
# what is left over it rounds otherwise. One example a step: a sum of gradients has no order then.
EXACT = {"batch_size": 1, "gradient_accumulation": 2, "lora_r": 8}


@pytest.fixture(scope="module")
def benches():
    """The workbenches of one process, and of the one that leads two."""
    alone, leads = Workbench(), Workbench()
    yield alone, leads
    leads.end()


@pytest.fixture
def both(benches, small, tmp_path):
    """Runs a cell in one process and in two: ``(result, merged checkpoint)`` of each."""

    def run(**values):
        cell = CellConfig(**{"model": "tiny-llama", "keep": "all", **small, **values})
        masks, kind = None, mask_set_of(cell)
        if kind is not None:
            (masks,) = make_masks(replace(kind, sparsities=(cell.sparsity,)), benches[0], tmp_path / "masks")
        found = []
        for size, bench in enumerate(benches, 1):
            result = run_cell(replace(cell, gpus_per_cell=size), masks, bench, tmp_path / f"{size}")
            found.append((result, Checkpoint(result.merged)))
        return found

    return run


def numbers(result):
    """What does not depend on the clock."""
    return {
        name: value
        for name, value in result.metrics.items()
        if not name.startswith(("time/", "memory/")) and "_per_second" not in name
    }


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("dense", "float32"),
        ("sparse_to_dense", "float32"),
        ("sparse_to_sparse", "float32"),
        ("sparse_to_sparse", "bfloat16"),
        ("pruned", "float32"),
    ],
)
def test_two_processes_make_the_model_of_one(both, mode, dtype):
    (one, first), (two, second) = both(mode=mode, dtype=dtype, **EXACT)
    assert numbers(one) == numbers(two)
    assert first.fingerprint == second.fingerprint == two.tags["merged_fingerprint"]
    assert one.tags == two.tags and one.protocol == two.protocol
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    if MODES[mode].lora:
        one, two = (checkpoint.folder.parent / "adapter" for checkpoint in (first, second))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("model", "values", "bound"),
    [
        ("tiny-llama", {"mode": "full", **EXACT}, 1e-6),  # the length of all gradients is summed in shares
        # and so are the gradients
        ("tiny-mixtral", {"batch_size": 3, "gradient_checkpointing": "non_reentrant"}, 1e-5),
    ],
)
def test_a_batch_that_is_shared_gives_the_model_of_one_process_but_for_its_last_digits(both, model, values, bound):
    (one, first), (two, second) = both(model=model, **values)
    assert two.metrics["sparsity/violations"] == 0
    assert two.metrics["sparsity/after_merge"] == one.metrics["sparsity/after_merge"]
    assert two.metrics["eval/loss_untuned"] == one.metrics["eval/loss_untuned"]
    assert two.metrics["eval/loss"] == pytest.approx(one.metrics["eval/loss"], rel=1e-5)
    assert two.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-5)
    moved = 0
    start = Checkpoint(Workbench().checkpoint(model).folder)
    for name in first.names:
        difference = (first.tensor(name) - second.tensor(name)).abs().max()
        assert difference <= bound, name
        moved += int((first.tensor(name) != start.tensor(name)).sum())
    assert moved


def test_a_lost_member_costs_the_cell_one_try(benches, small, tmp_path):
    _, leads = benches
    cell = CellConfig(**{"model": "tiny-llama", **small, "mode": "pruned", "sparsity": 0.0, "gpus_per_cell": 2})
    (masks,) = make_masks(replace(mask_set_of(cell), sparsities=(0.0,)), leads, tmp_path / "masks")
    first = run_cell(cell, masks, leads, tmp_path / "1")
    (pid,) = leads.group._members.folder.glob("*.pid")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    with pytest.raises(MemberLostError, match=r"process 2 of the group's 2 is gone \(signal 9\)") as lost:
        run_cell(cell, masks, leads, tmp_path / "2")
    failure = classify(lost.value)
    assert failure.kind == "worker_lost" and failure.keeps_process
    assert not torch.distributed.is_initialized()
    assert numbers(run_cell(cell, masks, leads, tmp_path / "3")) == numbers(first)
