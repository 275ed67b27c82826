"""What NVIDIA's driver and the installed torch say of themselves, and whether the one can use the other's GPUs.

No torch is imported: an installation is asked before there is one, and a dry run needs none.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Driver", "TorchBuild", "hides_gpus", "nvidia_driver", "torch_build", "torch_index", "unusable"]

_INDEX = "https://download.pytorch.org/whl/"
# Those that torch 2.13 has: the least CUDA of the driver, the least compute capability of the GPUs, the name. A driver
# runs every CUDA of its own major version that is older, and newer ones too (minor version compatibility).
_INDEXES = (((13, 0), (7, 5), "cu130"), ((12, 8), (7, 5), "cu129"), ((12, 0), (5, 0), "cu126"))
_OLDEST = "525"  # the first driver of CUDA 12
_ELSE = "put that right, or choose device cpu"


@dataclass(frozen=True)
class Driver:
    """A driver that has at least one GPU.

    Attributes:
        version: as NVIDIA counts, ``570.86.15``.
        cuda: the newest CUDA that it runs.
        gpu: what the first GPU calls itself.
        capability: the least compute capability of the GPUs; None where it is not known.
        trouble: why it does not answer, in its own words, where it does not; the rest is empty then.
    """

    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    gpu: str = ""
    capability: tuple[int, int] | None = None
    trouble: str = ""


@dataclass(frozen=True)
class TorchBuild:
    """The torch that is installed.

    Attributes:
        version: with what it was built for, ``2.13.0+cu130``.
        cuda: that it was built with; None for a build without.
    """

    version: str
    cuda: tuple[int, int] | None


def unusable(driver: Driver | None, torch: TorchBuild | None, failed: str | None = None) -> str | None:
    """Why torch cannot use this machine's NVIDIA GPU, and what to do, in a sentence; None where nothing is known
    against it.

    Args:
        driver: None where there is no NVIDIA GPU.
        torch: None where it does not say how it was built.
        failed: what torch said when it was asked for a GPU and found none; None if it was not asked.
    """
    if driver is None:
        return None
    if driver.trouble:
        return (
            None if failed is None else f"NVIDIA's driver is installed but does not answer ({driver.trouble}); {_ELSE}"
        )
    here = f"{driver.gpu} is here (driver {driver.version}, CUDA {_dotted(driver.cuda)})"
    if torch is None:
        return None if failed is None else f"{here}, but torch cannot use it: {failed}; {_ELSE}"
    if torch.cuda is None:
        return f"{here}, but torch {torch.version} is built without CUDA; {_remedy(driver, torch)}"
    if torch.cuda[0] > driver.cuda[0]:
        needs = f"torch {torch.version} is built for CUDA {_dotted(torch.cuda)}, which this driver is too old for"
        return f"{here}, but {needs}; {_remedy(driver, torch)}"
    if failed is None:
        return None
    return f"{here}, but torch {torch.version}, built for CUDA {_dotted(torch.cuda)}, cannot use it: {failed}; {_ELSE}"


def _remedy(driver: Driver, torch: TorchBuild) -> str:
    index = torch_index(driver.cuda, driver.capability)
    if index is None:
        return f"update the driver to {_OLDEST} or newer, or choose device cpu"
    wanted = f"torch=={torch.version.partition('+')[0]}+{index.rpartition('/')[2]}"
    return f"pip install {wanted} --index-url {index}, or choose device cpu"


def torch_index(cuda: tuple[int, int], capability: tuple[int, int] | None = None) -> str | None:
    """The package index whose torch such a driver runs, on such GPUs; None for a driver that is too old.

    Args:
        cuda: the newest that the driver runs.
        capability: the least compute capability of its GPUs; None takes those that all builds know.
    """
    for least, oldest, name in _INDEXES:
        if cuda >= least and (capability is None or capability >= oldest):
            return _INDEX + name
    return None


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` names no GPU at all: that is a choice, as device cpu is one."""
    return environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def nvidia_driver() -> Driver | None:
    """What NVML says; None where no driver is loaded, or has no GPU."""
    import pynvml

    absent = (
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
        pynvml.NVML_ERROR_NO_PERMISSION,  # a batch system gave this job none
    )
    try:
        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            if not gpus:
                return None
            cuda = pynvml.nvmlSystemGetCudaDriverVersion()  # 12040 is 12.4
            return Driver(
                pynvml.nvmlSystemGetDriverVersion(),
                (cuda // 1000, cuda % 1000 // 10),
                pynvml.nvmlDeviceGetName(gpus[0]),
                min(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(gpu)) for gpu in gpus),
            )
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None if error.value in absent else Driver(trouble=str(error))


def torch_build() -> TorchBuild | None:
    """How the installed torch was built, by the file that it says so in; None where there is none, or it is for other
    GPUs than NVIDIA's."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    said = runpy.run_path(str(file))
    if said.get("hip"):  # for AMD's GPUs, which may stand beside NVIDIA's
        return None
    return _build(str(said.get("__version__")), said.get("cuda"))


def _build(version: str, cuda: str | None) -> TorchBuild:
    major, minor = (cuda.split(".") + ["0"])[:2] if cuda else ("", "")
    return TorchBuild(version, (int(major), int(minor)) if cuda else None)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
