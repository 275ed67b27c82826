"""The variables of a launcher and of accelerate, held back while one process computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState, PartialState

__all__ = ["arithmetic_variables", "one_process"]

# What accelerate and the Trainer read: who they think they are among other processes, and settings that would
# override ours. An MPI, torchrun, Kubeflow or SLURM template leaves them behind in a single process as well.
_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "DEEPSPEED_", "TORCHELASTIC_"),
    *("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MPI_", "MV2_COMM_WORLD_", "SLURM_", "SM_", "SMDATAPARALLEL_"),
)
_NAMES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
        *("ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED", "USE_TORCH_XLA"),
    }
)
# Libraries read these once, when they are loaded: too late to hide, so that they belong to a number's protocol.
_ARITHMETIC = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"),
)


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, accelerate finds neither variables of a launcher nor a state made earlier: it is one process.

    Variables and states are afterwards what they were before, whatever was set inside.
    """
    variables = _hidden()
    states = [
        (kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)
    ]
    for name in variables:
        del os.environ[name]
    for state, _ in states:
        state.clear()
    try:
        yield
    finally:
        for name in _hidden():
            del os.environ[name]
        os.environ.update(variables)
        for state, before in states:
            state.clear()
            state.update(before)


def arithmetic_variables() -> dict[str, str]:
    """Those set variables that change the last digits (or more) and cannot be held back."""
    return {name: os.environ[name] for name in _ARITHMETIC if name in os.environ}


def _hidden() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
