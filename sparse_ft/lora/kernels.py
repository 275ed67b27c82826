"""Whether the kernels of `sparse_ft.lora.fused` do the work on a device, or plain torch."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType

import torch

__all__ = ["kernels_of", "made_by"]


@lru_cache
def kernels_of(kind: str) -> ModuleType | None:
    """`sparse_ft.lora.fused` where it works on devices of this kind (``cuda``); None where plain torch takes its place.

    Tried once a process, and always with the same end on one machine: forward, merge and rebuild agree.
    """
    if kind != "cuda":
        return None
    try:
        from sparse_ft.lora import fused

        fused.try_out(kind)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler for its launchers, a GPU that it does not know
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"the kernels of sparse LoRA do not run here, torch does their work: {said}", stacklevel=2)
        return None
    return fused


def made_by(device: torch.device) -> str:
    """What makes dithered weights on a device, ``triton 3.7.1`` or ``torch``: the last bits of a sum depend on it."""
    kernels = kernels_of(device.type)
    return "torch" if kernels is None else f"triton {kernels.triton.__version__}"
