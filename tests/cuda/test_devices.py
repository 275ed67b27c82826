"""What the real driver says, and a torch that cannot use it."""

import os
import subprocess
import sys

import pynvml
import torch

from sparse_ft.models.devices import check_device, resolve_device
from sparse_ft.nvidia import nvidia_driver, torch_build, torch_index, unusable


def test_nvml_and_torch_say_the_same_of_this_machine():
    driver, build = nvidia_driver(), torch_build()
    assert driver.gpu == torch.cuda.get_device_name(0) and not driver.trouble
    assert driver.capability <= torch.cuda.get_device_capability(0)
    assert build.cuda == tuple(map(int, torch.version.cuda.split(".")))
    assert unusable(driver, build) is None and torch_index(driver.cuda, driver.capability)
    check_device("auto")
    assert resolve_device("auto") == torch.device("cuda:0")


def test_a_gpu_that_torch_does_not_get_is_refused_and_a_hidden_one_is_not():
    pynvml.nvmlInit()
    words = [sys.executable, "-c", "from sparse_ft.models.devices import resolve_device as r; print(r('auto'))"]

    def asked(visible):
        return subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": visible}, capture_output=True, text=True)

    missing = asked(str(pynvml.nvmlDeviceGetCount()))
    assert missing.returncode == 1 and "cannot use it" in missing.stderr and "CUDA_VISIBLE_DEVICES=" in missing.stderr
    assert asked("").stdout == "cpu\n"
