"""The kernels without a GPU: in Triton's interpreter, and compiled for GPUs. `tests/cuda` runs them on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_ft.lora.kernels import kernels_of, made_by

INTERPRETED = Path(__file__).with_name("interpreted.py")
ROOT = INTERPRETED.parents[2]

# For Triton reads both variables when it is imported; its compiler needs no GPU.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_ft.lora import fused

ROWS, COLUMNS = {"ROWS": 16, "COLUMNS": 256}, {"MASKED": True, "BFLOAT16": True}
TYPES = {"out_ptr": "*i16", "weight_ptr": "*i16", "in_ptr": "*i16", "a_ptr": "*fp32", "b_ptr": "*fp32",
         "bits_ptr": "*u8", "scaling": "fp32"}
for kernel, constants in ((fused._effective, ROWS | COLUMNS), (fused._prune, ROWS)):
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    for capability in (80, 90):
        source, target = ASTSource(kernel, types, constants), GPUTarget("cuda", capability, 32)
        print(triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"])
"""


def run(*arguments, **variables):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds and with the test environment on Linux")
    assert " passed" in run("-m", "pytest", "-q", "-x", str(INTERPRETED), TRITON_INTERPRET="1")


@pytest.mark.slow
def test_they_compile_for_gpus_and_round_after_each_operation(tmp_path):
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds and with the test environment on Linux")
    assembly = run("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert {"80", "90"} == set(re.findall(r"^\.target sm_(\d+)", assembly, re.MULTILINE))
    assert "add.rn.f32" in assembly and "mul.rn.f32" in assembly and "fma." not in assembly


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_where_they_do_not_run_torch_does_their_work_and_says_why():
    kernels_of.cache_clear()
    try:
        with pytest.warns(UserWarning, match="torch does their work: "):
            assert kernels_of("cuda") is None
        assert made_by(torch.device("cuda")) == made_by(torch.device("cpu")) == "torch"
    finally:
        kernels_of.cache_clear()
