"""Where and in which precision a model runs, by the names that people give. torch is imported when one is resolved."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

from sparse_ft.errors import UserError
from sparse_ft.nvidia import hides_gpus, nvidia_driver, torch_build, unusable

if TYPE_CHECKING:
    import torch

__all__ = [
    "UnusableGpuError",
    "check_device",
    "device_name",
    "itemsize",
    "missing_gpus",
    "resolve_device",
    "resolve_dtype",
]

_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


class UnusableGpuError(UserError):
    """This machine has an NVIDIA GPU that the installed torch cannot use: nothing computes on the CPU instead unless
    that is asked for."""

    failure_class = "worker_lost"  # of a worker elsewhere: its machine fails, not its cells


def check_device(device: str) -> None:
    """`resolve_device` for its errors alone, as far as they are known without torch, where the device needs none.

    Raises:
        UserError: no such device here.
        UnusableGpuError: ``auto``, and a GPU that the installed torch cannot use.
    """
    if device == "auto":
        _refuse_unusable()
    elif device != "cpu":
        resolve_device(device)


def resolve_device(device: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is the first CUDA device, or the CPU of a machine without an NVIDIA GPU.

    Raises:
        UserError: no such device here.
        UnusableGpuError: a GPU that the installed torch cannot use.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        _refuse_unusable(asked=True)
        return torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device '{device}' is no device; use auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        if not torch.cuda.is_available():
            _refuse_unusable(asked=True)
        raise UserError(
            f"device '{device}' is not here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; use auto or cpu, or install a torch built for your GPU"
        )
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def _refuse_unusable(asked: bool = False) -> None:
    """Raises UnusableGpuError where there is a GPU that torch cannot use; for what only torch itself can say, it is
    ``asked``."""
    driver = None if hides_gpus(os.environ) else nvidia_driver()
    if driver is None:
        return
    if (problem := unusable(driver, torch_build(), _cuda_error() if asked else None)) is not None:
        raise UnusableGpuError(f"device: {problem}.")


def _cuda_error() -> str:
    """What torch says when it has to use a GPU and cannot."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return str(error).partition("\n")[0].rstrip(".") + (f", with CUDA_VISIBLE_DEVICES={hidden}" if hidden else "")
    return "it sees no GPU"


def missing_gpus(device: str, wanted: int) -> str | None:
    """Why a cell cannot have so many GPUs here; None: it can, or it runs on a CPU.

    Raises:
        UserError: no such device here.
    """
    if device == "cpu" or wanted == 1 or resolve_device(device).type != "cuda":
        return None
    import torch

    if wanted <= (there := torch.cuda.device_count()):
        return None
    return f"gpus_per_cell is {wanted}, and {there} GPUs are here; lower it, or use a machine that has them"


def device_name(device: torch.device) -> str:
    """What the device calls itself: ``NVIDIA H100 80GB HBM3``, ``AMD EPYC 7763``."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an ARM
        return platform.processor() or platform.machine()


def itemsize(dtype: str, device: str) -> int:
    """Bytes of a weight in that precision there; takes no torch for a precision that does not depend on the device.

    Raises:
        UserError: as `resolve_dtype`.
    """
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    return resolve_dtype(dtype, resolve_device(device)).itemsize


def resolve_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """The torch dtype of that name; ``auto`` depends on the device.

    ``auto`` is bfloat16 on a CUDA device that computes in it, else float32. Not every CPU has bfloat16
    instructions, and without them it is slower than float32, so there the safe precision is the default
    and ``bfloat16`` a choice. float16 is never the default: training in it needs loss scaling.

    Raises:
        UserError: a name that is not auto, float32, bfloat16 or float16.
    """
    import torch

    if dtype in _DTYPES:
        return getattr(torch, dtype)
    if dtype != "auto":
        raise UserError(f"dtype '{dtype}' is not one of auto, {', '.join(_DTYPES)}")
    on_cuda = torch.device(device).type == "cuda"
    return torch.bfloat16 if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
