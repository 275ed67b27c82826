"""Which torch `make demo` installs, by what a program called nvidia-smi prints as NVIDIA's does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD = """Sat Nov 28 10:07:44 2026
+---------------------------------------------------------------------------------------+
| {head} |
|-----------------------------------------+----------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id        Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |         Memory-Usage | GPU-Util  Compute M. |
|=========================================+======================+======================|
|   0  NVIDIA H100 80GB HBM3          On  | 00000000:19:00.0 Off |                    0 |
| N/A   33C    P0              71W / 700W |      2MiB / 81559MiB |      0%      Default |
+-----------------------------------------+----------------------+----------------------+
"""
OLD = HEAD.format(head="NVIDIA-SMI 535.129.03             Driver Version: 535.129.03   CUDA Version: 12.2    ")
NEW = HEAD.format(head="NVIDIA-SMI 610.57.04              KMD Version: 610.57.04     CUDA UMD Version: 13.3  ")
OLDEST = HEAD.format(head="NVIDIA-SMI 470.223.02   Driver Version: 470.223.02   CUDA Version: 11.4              ")
UNKNOWN = HEAD.format(head="NVIDIA-SMI 535.129.03             Driver Version: 535.129.03   CUDA Version: N/A     ")
FAILED = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
URL = "https://download.pytorch.org/whl/"


def _asked(tmp_path, printed, gpus="9.0", status=0):
    """Runs the script where ``nvidia-smi`` prints that, or where there is none."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    if printed is not None:
        (tmp_path / "head").write_bytes(printed if isinstance(printed, bytes) else printed.encode())
        (tmp_path / "gpus").write_text(gpus + "\n")
        query = f'case "$1" in --query-gpu=compute_cap) /bin/cat {tmp_path}/gpus;; *) /bin/cat {tmp_path}/head;; esac'
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{query}\nexit {status}\n")
        (programs / "nvidia-smi").chmod(0o755)
    # -S, without site-packages: as in an environment that was made a moment ago.
    words = [sys.executable, "-S", "-m", "requirements.torch_index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": str(programs)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("printed", "gpus", "index"),
    [
        (NEW, "10.0", "cu130"),
        (NEW, "9.0\n7.0", "cu126"),  # the oldest GPU decides
        (OLD, "9.0", "cu126"),
        (OLD, 'Field "compute_cap" is not a valid field to query.', "cu126"),
    ],
)
def test_a_driver_gets_the_torch_that_it_runs(tmp_path, printed, gpus, index):
    options, said = _asked(tmp_path, printed, gpus)
    assert options == f"--index-url {URL}{index}\n"
    assert f"torch comes from {URL}{index}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("printed", "status"),
    [(None, 0), (FAILED, 9), (UNKNOWN, 0), ("", 0), (b"\xff\xfe\x00CUDA Version: \n", 0), (NEW, 1)],
)
def test_without_a_driver_that_answers_torch_stays_as_it_is_pinned(tmp_path, printed, status):
    assert _asked(tmp_path, printed, status=status) == ("", "")


def test_a_driver_that_is_too_old_is_named(tmp_path):
    options, said = _asked(tmp_path, OLDEST)
    assert options == "" and "CUDA up to 11.4: no build of the pinned torch is that old" in said
