import errno
import sqlite3
from pathlib import Path

import pytest
import requests
import torch
from httpx2 import ConnectTimeout
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import REQUEST_LIMIT_EXCEEDED, RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE
from sqlalchemy.exc import OperationalError
from transformers import AutoConfig

from sparse_ft.cell.failures import CellTimeoutError, ValidationFailedError, WorkerLostError, classify, parse_retry
from sparse_ft.errors import DataMissingError, ModelUnavailableError, UserError
from sparse_ft.evaluation import NonFiniteScoresError
from sparse_ft.models.skeleton import model_config
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
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), "worker_lost"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "worker_lost"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "worker_lost"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"), "worker_lost"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "worker_lost"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error"), "worker_lost"),
        (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure"), "worker_lost"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "configuration"),
        (KeyError("CUDA error: a key of that name"), "bug"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "infrastructure"),
        (OSError(errno.ESTALE, "Stale file handle"), "infrastructure"),
        (OSError(errno.EIO, "Input/output error"), "infrastructure"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "infrastructure"),
        (TimeoutError("timed out"), "infrastructure"),
        (ConnectTimeout("the hub"), "infrastructure"),
        (sqlite3.OperationalError("database is locked"), "infrastructure"),
        (OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly")), "infrastructure"),
        (OperationalError("SELECT 1", {}, Exception("no such table: runs")), "bug"),
        (requests.ConnectionError("Max retries exceeded with url: /api"), "infrastructure"),
        (requests.ReadTimeout("Read timed out. (read timeout=120)"), "infrastructure"),
        (MlflowException("try later", TEMPORARILY_UNAVAILABLE), "infrastructure"),
        (MlflowException("slow down", REQUEST_LIMIT_EXCEEDED), "infrastructure"),
        (MlflowException("no such run", RESOURCE_DOES_NOT_EXIST), "bug"),
        (RuntimeError("Error while serializing: I/O error: Input/output error (os error 5)"), "infrastructure"),
        (RuntimeError("Error while serializing: I/O error: No such file or directory (os error 2)"), "bug"),
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


def test_what_a_library_wraps_is_told_by_what_it_wraps():
    try:
        raise ValueError("cannot log the batch") from ConnectionResetError(errno.ECONNRESET, "reset")
    except ValueError as error:
        assert classify(error).kind == "infrastructure"


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.ESTALE, "Stale file handle"), "infrastructure"),
        (RuntimeError("CUDA error: unspecified launch failure"), "worker_lost"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "configuration"),
        (ValueError("rope_type is odd"), "configuration"),
    ],
)
def test_a_file_that_the_machine_could_not_read_is_no_fault_of_the_configuration(cause, kind):
    try:
        raise UserError("transformers cannot read config.json") from cause
    except UserError as error:
        assert classify(error).kind == kind


def test_an_alarm_is_not_taken_for_an_error_of_the_call_that_it_breaks_off(monkeypatch, tiny_model):
    def too_long(*args, **values):
        raise CellTimeoutError("the cell took longer than 0.5 s")

    monkeypatch.setattr(AutoConfig, "from_pretrained", too_long)
    with pytest.raises(CellTimeoutError):
        model_config(tiny_model("tiny-llama"))


def test_no_password_is_in_a_failure():
    try:
        raise RuntimeError("no route to postgresql://me:s3/cr@t@db/x?sslpassword=t0p")
    except RuntimeError as error:
        failure = classify(error)
    assert failure.message == "no route to postgresql://me:***@db/x?sslpassword=***"
    assert "postgresql://me:***@db/x?sslpassword=***" in failure.traceback.splitlines()[-1]


def test_classes_to_try_again_are_read_as_people_write_them():
    assert parse_retry("none") == frozenset()
    assert parse_retry("bug") == parse_retry("[bug]") == parse_retry("['bug']") == {"bug"}
    assert parse_retry("bug, validation_failed") == {"bug", "validation_failed"}
    with pytest.raises(UserError, match="there is no failure class 'bugs'"):
        parse_retry("bugs")
