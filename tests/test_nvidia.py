"""Which torch a driver can use, and what is said where it has another one."""

import subprocess
import sys
from importlib.machinery import ModuleSpec

import pynvml
import pytest

from sparse_ft.nvidia import Driver, TorchBuild, hides_gpus, nvidia_driver, torch_build, torch_index, unusable

OLD = Driver("535.129.03", (12, 2), "NVIDIA H200", (9, 0))
NEW = Driver("580.65.06", (13, 0), "NVIDIA B200", (10, 0))
CPU, CU126, CU130 = TorchBuild("2.13.0+cpu", None), TorchBuild("2.13.0+cu126", (12, 6)), TorchBuild("2.13.0", (13, 0))
INDEX = "https://download.pytorch.org/whl/"


@pytest.mark.parametrize(
    ("cuda", "capability", "name"),
    [
        ((13, 4), (10, 0), "cu130"),
        ((13, 0), None, "cu130"),
        ((13, 0), (7, 0), "cu126"),  # the newer builds have no kernels for a V100
        ((12, 9), (9, 0), "cu129"),
        ((12, 8), (12, 0), "cu129"),  # nor the older ones for Blackwell
        ((12, 8), (6, 1), "cu126"),
        ((12, 7), (9, 0), "cu126"),
        ((12, 0), None, "cu126"),
        ((12, 0), (3, 7), None),
        ((11, 8), (8, 0), None),
        ((0, 0), None, None),
    ],
)
def test_a_driver_has_an_index_whose_torch_it_runs(cuda, capability, name):
    assert torch_index(cuda, capability) == (None if name is None else INDEX + name)


@pytest.mark.parametrize("failed", [None, "it sees no GPU"])
@pytest.mark.parametrize(
    ("driver", "build", "said"),
    [
        (OLD, CPU, "NVIDIA H200 is here (driver 535.129.03, CUDA 12.2), but torch 2.13.0+cpu is built without CUDA; "
         f"pip install torch==2.13.0+cu126 --index-url {INDEX}cu126, or choose device cpu"),
        (NEW, CPU, f"built without CUDA; pip install torch==2.13.0+cu130 --index-url {INDEX}cu130, or"),
        (OLD, CU130, "but torch 2.13.0 is built for CUDA 13.0, which this driver is too old for; pip install "
         f"torch==2.13.0+cu126 --index-url {INDEX}cu126"),
        (Driver("470.1", (11, 4), "A", (8, 0)), CU126, "too old for; update the driver to 525 or newer, or choose"),
        (Driver("470.1", (11, 4), "A"), CPU, "built without CUDA; update the driver to 525 or newer, or choose"),
    ],
)  # fmt: skip
def test_a_torch_that_cannot_use_the_gpu_is_named_before_it_is_asked(driver, build, said, failed):
    assert said in unusable(driver, build, failed)


@pytest.mark.parametrize(
    ("driver", "build"),
    [(None, CPU), (None, None), (OLD, CU126), (NEW, CU126), (NEW, CU130), (NEW, None), (Driver(trouble="?"), CU126)],
)
def test_what_may_work_is_refused_only_when_torch_says_that_it_does_not(driver, build):
    assert unusable(driver, build) is None
    said = unusable(driver, build, "No CUDA GPUs are available")
    if driver is None:
        assert said is None
    elif driver.trouble:
        assert "does not answer (?); put that right, or choose device cpu" in said
    else:
        assert "cannot use it: No CUDA GPUs are available; put that right, or choose device cpu" in said


@pytest.mark.parametrize(
    ("value", "hidden"), [(None, False), ("0", False), ("GPU-7a", False), ("", True), (" ", True), ("-1", True)]
)
def test_gpus_are_hidden_by_a_variable_that_names_none(value, hidden):
    assert hides_gpus({} if value is None else {"CUDA_VISIBLE_DEVICES": value}) is hidden


def test_without_nvidias_library_there_is_no_driver():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        assert nvidia_driver() is None
    else:
        pytest.skip("NVIDIA's library is here: tests/cuda/test_devices.py asks it")


ANSWERS = {
    "Init": None, "Shutdown": None, "DeviceGetCount": 2, "DeviceGetName": "NVIDIA H200",
    "SystemGetCudaDriverVersion": 12080, "SystemGetDriverVersion": "570.86.15",
}  # fmt: skip


def _answer(monkeypatch, **answers):
    for name, value in {**ANSWERS, **answers}.items():

        def told(*_, value=value):
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(pynvml, f"nvml{name}", told)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda gpu: (9 - gpu, 0))


def test_the_driver_says_its_version_its_cuda_and_the_oldest_of_its_gpus(monkeypatch):
    _answer(monkeypatch)
    assert nvidia_driver() == Driver("570.86.15", (12, 8), "NVIDIA H200", (8, 0))


@pytest.mark.parametrize(
    ("call", "number", "trouble"),
    [
        ("Init", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, None),
        ("DeviceGetCount", pynvml.NVML_ERROR_NO_PERMISSION, None),
        ("Init", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "RM has detected an NVML/RM version mismatch."),
        ("DeviceGetName", pynvml.NVML_ERROR_GPU_IS_LOST, "GPU is lost"),
    ],
)
def test_a_driver_that_is_not_there_is_told_from_one_in_trouble(monkeypatch, call, number, trouble):
    _answer(monkeypatch, **{call: pynvml.NVMLError(number)})
    assert nvidia_driver() == (None if trouble is None else Driver(trouble=trouble))


def test_a_driver_without_gpus_is_none(monkeypatch):
    _answer(monkeypatch, DeviceGetCount=0)
    assert nvidia_driver() is None


def test_how_torch_was_built_is_known_without_importing_it():
    code = (
        "import sys; from sparse_ft.nvidia import torch_build; print(torch_build()); assert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    import torch

    cuda = torch.version.cuda
    wanted = TorchBuild(torch.__version__, tuple(map(int, cuda.split(".")[:2])) if cuda else None)
    assert said == str(wanted) and torch_build() == wanted


def test_a_torch_that_is_not_there_says_nothing(monkeypatch):
    monkeypatch.setattr("sparse_ft.nvidia.find_spec", lambda name: None)
    assert torch_build() is None


@pytest.mark.parametrize(
    ("cuda", "hip", "found"),
    [("'13.0'", None, TorchBuild("2.13.0", (13, 0))), (None, None, TorchBuild("2.13.0", None)), (None, "'6.4'", None)],
)
def test_a_build_for_amd_is_not_held_against_nvidias_gpus(monkeypatch, tmp_path, cuda, hip, found):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda}\nhip = {hip}\n")
    monkeypatch.setattr(
        "sparse_ft.nvidia.find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "x.py"))
    )
    assert torch_build() == found
