import pytest
import torch

from sparse_ft.training.collator import IGNORED
from sparse_ft.training.shares import Shares


@pytest.fixture
def batch():
    return {"input_ids": torch.arange(15).view(5, 3), "labels": torch.arange(10).view(5, 2), "logits_to_keep": 2}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_row_of_a_batch_is_read_once(batch, size):
    shares = [Shares(rank, size).rows(batch) for rank in range(size)]
    for name in ("input_ids", "labels"):
        rows = torch.cat([share[name] for share in shares])
        assert torch.equal(rows[rows[:, 0].argsort()], batch[name])
    assert all(share["logits_to_keep"] == 2 for share in shares)


def test_a_process_without_a_row_reads_one_of_which_nothing_counts(batch):
    spare = Shares(6, 7).rows(batch)
    assert torch.equal(spare["input_ids"], batch["input_ids"][:1])
    assert (spare["labels"] == IGNORED).all() and spare["labels"].shape == (1, 2)


def test_the_mean_of_the_processes_parts_is_the_loss_of_the_whole_batch():
    parts = torch.tensor([0.25, 0.5, 1.0])  # of a sum
    assert torch.stack([Shares(rank, 3).own(part) for rank, part in enumerate(parts)]).mean() == parts.sum()
