"""Installs torch 2.4.0 into the environment that runs this, without the CUDA libraries that a CPU never calls.

    python requirements/cerebras_torch.py

cerebras-pytorch 2.10 pins torch 2.4.0, and the package index has that version for CUDA only: left to pip it
brings 2.4 GB of CUDA libraries, which the CPU backend and the Cerebras compiler never call. torch loads them by
name when it is imported, though. So the three small ones are installed, each of the seven large ones is replaced
by an empty shared object of its name, and the environment's Python is told to bind functions at their first call
(``RTLD_LAZY``), which for these never comes. Where `import torch` fails all the same, the real libraries are
installed instead.

Nothing is done where torch 2.4.0 is installed already, from whichever source: the CPU build of PyTorch's own
index, or the one of a Cerebras cluster.
"""

from __future__ import annotations

import importlib.metadata
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH = "2.4.0"
SMALL = ("nvidia-cuda-runtime-cu12==12.1.105", "nvidia-nvtx-cu12==12.1.105", "nvidia-cuda-cupti-cu12==12.1.105")
LARGE = (
    "nvidia-cublas-cu12==12.1.3.1",
    "nvidia-cudnn-cu12==9.1.0.70",
    "nvidia-cufft-cu12==11.0.2.54",
    "nvidia-curand-cu12==10.3.2.106",
    "nvidia-cusparse-cu12==12.1.0.106",
    "nvidia-nvjitlink-cu12==12.1.105",
    "nvidia-nccl-cu12==2.20.5",
)
STAND_INS = (
    "libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.9", "libcufft.so.11", "libcurand.so.10", "libcusparse.so.12",
    "libnccl.so.2",
)  # fmt: skip


def empty_library(name: str) -> bytes:
    """The smallest x86-64 shared object of that name which the loader takes: a dynamic section and no symbols."""
    header, program, dynamic, symbol = 64, 56, 16, 24
    strings = b"\0" + name.encode() + b"\0"
    at_hash = header + 2 * program
    table = struct.pack("<4I", 1, 1, 0, 0)  # one bucket, one symbol: the null symbol
    at_symbols = at_hash + len(table)
    at_strings = at_symbols + symbol
    at_dynamic = (at_strings + len(strings) + 7) // 8 * 8
    tags = [(14, 1), (4, at_hash), (5, at_strings), (6, at_symbols), (10, len(strings)), (11, symbol), (0, 0)]
    end = at_dynamic + dynamic * len(tags)
    elf = struct.pack("<4s12B", b"\x7fELF", 2, 1, 1, *[0] * 9)
    elf += struct.pack("<2HI3QI6H", 3, 62, 1, 0, header, 0, 0, header, program, 2, 64, 0, 0)
    elf += struct.pack("<2I6Q", 1, 6, 0, 0, 0, end, end, 4096)  # PT_LOAD, readable and writable
    elf += struct.pack("<2I6Q", 2, 6, at_dynamic, at_dynamic, at_dynamic, end - at_dynamic, end - at_dynamic, 8)
    body = (elf + table + b"\0" * symbol + strings).ljust(at_dynamic, b"\0")
    return body + b"".join(struct.pack("<2Q", *tag) for tag in tags)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *arguments], check=True)


def imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def main() -> int:
    try:
        if importlib.metadata.version("torch").split("+")[0] == TORCH:
            return 0
    except importlib.metadata.PackageNotFoundError:
        pass
    pip(f"torch=={TORCH}", *SMALL)
    # What torch needs to be imported; the environment's own list pins the same packages.
    pip("typing_extensions", "filelock", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec")
    if not imports():
        packages = Path(sysconfig.get_paths()["platlib"])
        lazy = packages / "lazy_binding.pth"
        lazy.write_text("import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n")
        for name in STAND_INS:
            (packages / "torch" / "lib" / name).write_bytes(empty_library(name))
        if not imports():
            for file in (lazy, *(packages / "torch" / "lib" / name for name in STAND_INS)):
                file.unlink()
            pip(*LARGE)
    return 0 if imports() else 1


if __name__ == "__main__":
    sys.exit(main())
