"""Parameters that more than one part has, each written once."""

from __future__ import annotations

from functools import partial

from sparse_ft.settings.field import setting

__all__ = ["DTYPES", "ROUNDINGS", "device", "dtype", "rounding", "seed"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
ROUNDINGS = ("dithered", "nearest")

device = partial(setting, "auto", "auto, cpu, cuda, cuda:1, ...", needed=True, named=True, behind="device")
dtype = partial(
    setting,
    "auto",
    "of the model; auto is float32 on a CPU, bfloat16 on a GPU that has it.",
    choices=DTYPES,
    needed=True,
    named=True,
    behind="dtype",
)
rounding = partial(
    setting,
    "dithered",
    "of trained weights in bfloat16 or float16: dithered keeps small updates in the mean, nearest loses them; float32"
    " needs neither.",
    choices=ROUNDINGS,
    time=False,
)
seed = partial(
    setting,
    0,
    "of random masks, the calibration sample, the adapters' start and the order of the examples.",
    least=0,
    most=2**32 - 1,
    masks=True,
    needed=True,
    time=False,
)
