"""The runner against real processes: small Python programs that print what ModelZoo prints."""

import os
import signal
import stat
import sys

import pytest

from sparse_ft.cerebras.runner import TrainerError, fit_command, run_fit, trainer_environment

PROGRESS = (
    "print('INFO:   | Train Device=cpu, Step={n}, Loss={loss}, Rate=9.0 samples/sec, GlobalRate=4.5 samples/sec',"
    " flush=True)"
)


def program(*lines):
    return [sys.executable, "-c", "\n".join(lines)]


def test_losses_rate_checkpoint_and_log(tmp_path):
    code = program(
        PROGRESS.format(n=1, loss=2.5),
        "print('INFO: job wsjob-abc123def')",
        PROGRESS.format(n=2, loss=2.25),
        f"open({str(tmp_path / 'checkpoint_2.mdl')!r}, 'w')",
        f"open({str(tmp_path / 'checkpoint_10.mdl')!r}, 'w')",
    )
    seen = []
    result = run_fit(code, tmp_path / "log" / "fit.log", tmp_path, seen.append)
    assert result.losses == [(1, 2.5), (2, 2.25)]
    assert [step.number for step in seen] == [1, 2]
    assert result.rate == 4.5
    assert result.checkpoint == tmp_path / "checkpoint_10.mdl"
    assert result.jobs == ["wsjob-abc123def"]
    assert "GlobalRate=4.5" in (tmp_path / "log" / "fit.log").read_text()


def test_a_lost_connection_goes_on_from_the_last_checkpoint(tmp_path):
    mark = tmp_path / "second"
    code = program(
        "import sys, pathlib",
        f"mark = pathlib.Path({str(mark)!r})",
        "if not mark.exists():",
        "    mark.write_text('')",
        f"    {PROGRESS.format(n=1, loss=3.0)}",
        f"    open({str(tmp_path / 'checkpoint_1.mdl')!r}, 'w')",
        "    print('grpc: Socket closed'); sys.exit(1)",
        "print('arguments', sys.argv[1:])",
        PROGRESS.format(n=1, loss=3.5),
        PROGRESS.format(n=2, loss=1.0),
    )
    result = run_fit(code, tmp_path / "fit.log", tmp_path)
    assert result.attempts == 2
    assert result.losses == [(1, 3.5), (2, 1.0)]
    assert f"['--checkpoint_path', '{tmp_path / 'checkpoint_1.mdl'}']" in (tmp_path / "fit.log").read_text()


def test_other_failures_are_not_tried_again(tmp_path):
    with pytest.raises(TrainerError) as error:
        run_fit(program("print('OSError: Disk quota exceeded'); raise SystemExit(1)"), tmp_path / "fit.log", tmp_path)
    assert error.value.failure.kind == "disk_quota"
    with pytest.raises(TrainerError, match="lost_connection"):
        run_fit(program("print('Socket closed'); raise SystemExit(1)"), tmp_path / "f.log", tmp_path, retries=1)


def test_ctrl_c_leaves_neither_process_nor_job_behind(tmp_path, monkeypatch):
    tool, cancelled = tmp_path / "bin" / "csctl", tmp_path / "cancelled"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {cancelled}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    code = program(
        "import os, time",
        "print('pid', os.getpid(), 'wsjob-abcdef12', flush=True)",
        PROGRESS.format(n=1, loss=1.0),
        "time.sleep(300)",
    )
    with pytest.raises(KeyboardInterrupt):
        run_fit(code, tmp_path / "fit.log", tmp_path, lambda step: os.kill(os.getpid(), signal.SIGINT))
    pid = int((tmp_path / "fit.log").read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert cancelled.read_text().split() == ["cancel", "job", "wsjob-abcdef12"]


def test_a_trainer_of_a_study_in_the_background_hears_that_it_is_to_stop(tmp_path):
    """What a shell starts with ``&`` ignores SIGINT, and so would its children: no job would be cancelled."""
    code = program(
        "import time",
        "try:",
        f"    {PROGRESS.format(n=1, loss=1.0)}",
        "    time.sleep(300)",
        "except KeyboardInterrupt:",
        f"    open({str(tmp_path / 'cancelled')!r}, 'w')",
    )

    def stop(step):
        raise SystemExit

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            run_fit(code, tmp_path / "fit.log", tmp_path, stop)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "cancelled").exists()


def test_commands():
    command = fit_command("/env/bin/python", "c.yaml", "CSX", ["mlflow_run=abc"], ["--validate_only"])
    assert command[1:6] == ["-m", "sparse_ft.cerebras.modelzoo.cszoo", "fit", "c.yaml", "--target_device"]
    assert command[-3:] == ["--validate_only", "--job_labels", "mlflow_run=abc"]
    assert "--job_labels" not in fit_command("python", "c.yaml", "CPU", ["a=b"])
    assert trainer_environment("/env/bin/python", {"PATH": "/bin"})["PATH"] == f"/env/bin{os.pathsep}/bin"
