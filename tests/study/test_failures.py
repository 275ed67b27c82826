import errno
import sqlite3
from pathlib import Path

import pytest
import torch

from sparse_ft.errors import DataMissingError, ModelUnavailableError, UserError
from sparse_ft.evaluation import NonFiniteScoresError
from sparse_ft.study.failures import CellTimeoutError, ValidationFailedError, WorkerLostError, classify
from sparse_ft.training import NonFiniteLossError


def _too_much_memory():
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk_full"),
        (sqlite3.OperationalError("database or disk is full"), "disk_full"),
        (OSError(errno.EACCES, "Permission denied"), "bug"),
        (NonFiniteLossError("the training loss is nan at step 3"), "non_finite_loss"),
        (NonFiniteScoresError("the loss is nan"), "non_finite_scores"),
        (ModelUnavailableError("gated"), "model_unavailable"),
        (DataMissingError("no split"), "data_missing"),
        (UserError("lora_r is 0"), "configuration"),
        (ValidationFailedError("3 weights"), "validation_failed"),
        (WorkerLostError("gone"), "worker_lost"),
        (CellTimeoutError("too long"), "timeout"),
        (ZeroDivisionError("division by zero"), "bug"),
    ],
)
def test_every_error_has_a_class(error, kind):
    assert classify(error).kind == kind


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, on which every write finds no room")
@pytest.mark.parametrize("writer", ["python", "torch"])
def test_a_disk_without_room_is_recognised_whoever_writes(writer):
    with pytest.raises((OSError, RuntimeError)) as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x") if writer == "python" else torch.save(torch.zeros(9), full)
    assert classify(caught.value).kind == "disk_full"


def test_memory_that_the_machine_does_not_have_is_recognised():
    try:
        _too_much_memory()
    except RuntimeError as error:
        failure = classify(error)
    assert failure.kind == "out_of_memory"
    assert "_too_much_memory" in failure.traceback


def test_the_message_is_one_line():
    failure = classify(RuntimeError("first\n  second\n" + "x" * 1000))
    assert "\n" not in failure.message
    assert len(failure.message) <= 300
