"""Prints pip's option for the index whose torch this machine's NVIDIA driver runs; nothing where there is no such GPU.

    python -m requirements.torch_index

Asks ``nvidia-smi``, for nothing is installed yet when `make demo` calls this.
"""

from __future__ import annotations

import re
import subprocess
import sys

from sparse_ft.nvidia import torch_index

# "CUDA Version: 12.2" until driver 600 or so, then "CUDA UMD Version: 13.3".
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*: *(\d+)\.(\d+)")
_CAPABILITY = re.compile(r"^\s*(\d+)\.(\d+)\s*$", re.MULTILINE)


def main() -> None:
    """Prints the option, and says on stderr what it is for."""
    found = _CUDA.search(_said())
    if found is None:
        return
    cuda = (int(found[1]), int(found[2]))
    gpus = _CAPABILITY.findall(_said("--query-gpu=compute_cap", "--format=csv,noheader"))
    capability = min(((int(major), int(minor)) for major, minor in gpus), default=None)
    index = torch_index(cuda, capability)
    here = f"an NVIDIA GPU whose driver runs CUDA up to {cuda[0]}.{cuda[1]}"
    if index is None:
        print(f"{here}: no build of the pinned torch is that old; update the driver to use the GPU", file=sys.stderr)
        return
    print(f"{here}: torch comes from {index}", file=sys.stderr)
    print(f"--index-url {index}")


def _said(*options: str) -> str:
    """What ``nvidia-smi`` prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
