from pathlib import Path

import pytest

from sparse_ft.cell.failures import Failure
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.study.jobs import CellJob, Outcome
from sparse_ft.study.queue import Queue


def _masks(checksum):
    here = Path()
    return MaskFile(here, 0.5, 0.5, checksum, 8, 4, here, None, None)


def _job(model="a", checksum="m", **cell):
    return CellJob(CellConfig(model=model, **cell), _masks(checksum), Path(), key="key")


def _failed(job, kind):
    return Outcome(job, "run", "FAILED", 1.0, failure=Failure(kind, "why", "where"))


def test_two_workers_start_with_different_models_and_each_stays_with_its_own():
    queue = Queue([_job(model, f"{model}{seed}", seed=seed) for model in "ab" for seed in range(3)])
    taken = {0: [], 1: []}
    while queue.left:
        for worker in taken:
            job = queue.take(worker)
            taken[worker].append(job.model)
        for worker, job in queue.running.items():
            queue.settle(worker, Outcome(job, "", "FINISHED", 1.0))
    assert taken == {0: ["a"] * 3, 1: ["b"] * 3}


def test_workers_with_one_model_keep_away_from_each_others_masks():
    modes = ("sparse_to_dense", "sparse_to_sparse")
    queue = Queue([_job(checksum=checksum, mode=mode) for checksum in "mn" for mode in modes])
    first, second = queue.take(0), queue.take(1)
    assert (first.masks.checksum, second.masks.checksum) == ("m", "n")


def test_a_lost_worker_costs_a_cell_one_try_and_a_bug_all():
    queue = Queue([_job()], max_retries=1)
    assert not queue.settle(0, _failed(queue.take(0), "worker_lost"))
    again = queue.take(0)
    assert again.attempt == 2
    assert queue.settle(0, _failed(again, "worker_lost"))
    assert (queue.left, len(queue.outcomes)) == (0, 1)
    queue = Queue([_job()], max_retries=5)
    assert queue.settle(0, _failed(queue.take(0), "bug"))


def test_retries_wait_until_everything_else_has_run():
    queue = Queue([_job(seed=1), _job(seed=2)])
    queue.settle(0, _failed(queue.take(0), "timeout"))
    assert [queue.take(0).cell.seed, queue.take(1).cell.seed] == [2, 1]


@pytest.mark.parametrize(("before", "after"), [((8, 1), (4, 2)), ((6, 2), (3, 4)), ((9, 1), (3, 3)), ((7, 1), (1, 7))])
def test_out_of_memory_is_tried_again_with_a_smaller_batch_and_the_same_step(before, after):
    job = _job(batch_size=before[0], gradient_accumulation=before[1], eval_batch_size=8)
    queue = Queue([job], max_retries=0)
    assert not queue.settle(0, _failed(queue.take(0), "out_of_memory"))
    again = queue.take(0)
    assert (again.cell.batch_size, again.cell.gradient_accumulation) == after
    assert again.cell.eval_batch_size == 4
    assert (again.key, again.planned) == (job.key, job.cell)
    assert again.tags["reduced_batch"] == f"{before[0]} -> {after[0]}"
    assert queue.settle(0, _failed(again, "out_of_memory"))  # once


def test_a_batch_of_one_cannot_be_halved():
    assert _job(batch_size=1).halved() is None


def test_a_worker_whose_cells_fail_alike_in_a_row_gets_no_more_and_another_goes_on():
    queue = Queue([_job(seed=seed) for seed in range(6)], max_retries=0)
    for number in range(3):
        failure = Failure("bug", f"error {number} at 0x7f{number} of actor {number}9a7f26d5353c3", "where")
        queue.settle(0, Outcome(queue.take(0), "run", "FAILED", 0.1, failure=failure))
    assert queue.take(0) is None
    assert "3 cells in a row failed alike (bug: error 2" in queue.stopped
    while (job := queue.take(1)) is not None:
        queue.settle(1, Outcome(job, "run", "FINISHED", 1.0))
    assert (queue.left, queue.stopped) == (0, "")


@pytest.mark.parametrize(
    ("kinds", "seconds", "words"),
    [
        (["configuration"] * 5, 0.1, "why"),  # a cell's own
        (["bug", "bug", "non_finite_loss", "bug", "bug"], 0.1, "why"),
        (["bug"] * 5, 60.0, "why"),  # they had their chance
    ],
)
def test_failures_of_the_cells_themselves_stop_nobody(kinds, seconds, words):
    queue = Queue([_job(seed=seed) for seed in range(6)], max_retries=0)
    for kind in kinds:
        queue.settle(0, Outcome(queue.take(0), "run", "FAILED", seconds, failure=Failure(kind, words, "where")))
    assert queue.take(0) is not None
