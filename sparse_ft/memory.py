"""Memory: the peak of a piece of work, on the device it runs on, and giving back what nobody uses."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["free_bytes", "held_bytes", "peak_bytes", "release_memory", "reset_peak", "trim_heap"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CONTAINER = Path("/sys/fs/cgroup")  # inside a container its own limits lie there, in the files of cgroup v2 or v1
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Starts a new measurement: the peak from now on. Returns whether the system allowed it.

    On Linux the process's high-water mark is reset; where the system does not allow that (another system, a
    container whose ``/proc`` is closed), the peak counts from the start of the process.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # proc(5): resets VmHWM to the present resident size
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak since `reset_peak`: allocated on a CUDA device, else resident in this process."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes held now, counted as `peak_bytes` counts: allocated on a CUDA device, else resident in this process."""
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that this process could take besides those it holds, as things stand.

    Of a CUDA device what is free there and what torch has reserved and does not use, within the process's own limit;
    else of the machine's memory what the system calls available, within the container's limit.
    """
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # newer than torch 2.6
        allowed = int(total * fraction(device)) - allocated
        return max(0, min(free + torch.cuda.memory_reserved(device) - allocated, allowed))
    return max(0, min(psutil.virtual_memory().available, _left_in_container(_CONTAINER)))


def _left_in_container(folder: Path) -> float:
    """Bytes below the limit of the control group whose files are in ``folder``; infinity where it has none."""
    for limit, usage, statistics, reclaimed in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            lines = dict(line.split() for line in (folder / statistics).read_text().splitlines())
            return left + int(lines.get(reclaimed, 0))  # pages of files, which give way
    return float("inf")


def release_memory() -> None:
    """Collects garbage, and gives what nobody uses back: the heap's pages, and a CUDA device's blocks."""
    import torch

    gc.collect()
    trim_heap()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Gives freed pages of the heap back to the system; does nothing where the C library is not glibc.

    glibc keeps freed blocks of up to 32 MB, and small blocks that live on settle in the holes: work that goes tensor
    by tensor then ends with as much memory as all tensors together. Call it after each tensor of such work.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
