import pytest

from sparse_ft.cerebras.logs import Step, classify_log, job_ids, parse_line

LINE = (
    "2026-01-01 02:55:22,395 INFO:   | Train Device=cpu, Step=5, Loss=6.57767, Rate=18.93 samples/sec,"
    " GlobalRate=14.29 samples/sec, LoopTimeRemaining=0:00:00, TimeRemaining>0:00:00"
)


def test_a_line_of_the_real_trainer():
    assert parse_line(LINE) == Step("Train", 5, 6.57767, 14.29)
    assert parse_line("2026-01-01 02:55:22 INFO:   Saving checkpoint at step 5") is None
    on_wafer = LINE.replace("Device=cpu", "Device=CSX").replace("Loss=6.57767", "Loss=nan")
    assert parse_line(on_wafer).loss != parse_line(on_wafer).loss  # nan


@pytest.mark.parametrize(
    "line, kind",
    [
        (
            "  Input tag 'sparsemask' found using <lambda>() does not match any of the expected tags: 'x'",
            "configuration_refused",
        ),
        ("sparse_ft.errors.UserError: The masks do not fit the model", "configuration_refused"),
        ("grpc: status = StatusCode.UNAVAILABLE failed to connect to all addresses", "cluster_unreachable"),
        ("cerebras.appliance.errors.ApplianceHealthPollException: poll failed", "lost_connection"),
        ("OSError: [Errno 122] Disk quota exceeded: '/x/checkpoint_5.mdl'", "disk_quota"),
        ("ApplianceRuntimeJobTimeoutError: job ran longer than it may", "job_time_limit"),
        ("RuntimeError: torch-to-cirh lowering failed:", "compile_failed"),
        ("cerebras.appliance.errors.ApplianceNanError: loss", "non_finite_loss"),
        ("ClusterJobCancelledByCsctl: job was cancelled by csctl", "cancelled"),
    ],
)
def test_classes_of_failure(line, kind):
    failure = classify_log(["INFO: before", line, "INFO: after"], 1)
    assert failure.kind == kind
    assert failure.message in " ".join(line.split())
    assert failure.retried == (kind == "lost_connection")


def test_what_is_unknown_gives_the_last_exception():
    lines = ["Traceback (most recent call last):", "ZeroDivisionError: division by zero", "done"]
    assert classify_log(lines, 1).kind == "trainer_failed"
    assert "ZeroDivisionError" in classify_log(lines, 1).message
    assert classify_log([], -9).kind == "out_of_memory"


def test_jobs_named_in_a_log():
    lines = ["INFO: Initiating a new execute wsjob-a1b2c3d4e5", "again wsjob-a1b2c3d4e5 and wsjob-zzzzzz99"]
    assert job_ids(lines) == ["wsjob-a1b2c3d4e5", "wsjob-zzzzzz99"]
