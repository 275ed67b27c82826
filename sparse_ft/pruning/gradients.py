"""Gradient statistics of a whole model: peak memory is weights, accumulators and one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import resolve_device, resolve_dtype
from sparse_ft.models.loading import load_model
from sparse_ft.models.names import slots
from sparse_ft.progress import SILENT, Progress

__all__ = ["gradient_statistics"]

_KINDS = ("gradient", "product")


def gradient_statistics(
    checkpoint_folder: str | Path,
    token_ids: torch.Tensor,
    kinds: Sequence[str] = ("gradient",),
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = SILENT,
) -> dict[str, dict[str, torch.Tensor]]:
    """Means over samples of \\|g\\| (``gradient``) and of \\|w*g\\| (``product``), per prunable weight.

    g is the gradient of one sample's mean next-token loss. Each parameter's gradient is added to the
    accumulators and freed as soon as the backward pass has it; the accumulators are on the CPU.

    Args:
        checkpoint_folder: a Hugging Face folder.
        token_ids: int64 ``[samples, seq_len]``.
        kinds: of ``gradient``, ``product``.
        dtype: of the model. bfloat16 gradients are rounded, the sums are float32.
        device: where the model computes.

    Returns:
        kind -> checkpoint tensor name -> float32 CPU tensor of the tensor's shape.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    unknown = set(kinds) - set(_KINDS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}")
    checkpoint = Checkpoint(checkpoint_folder)
    where = slots(checkpoint.config, checkpoint.prunable)
    target = resolve_device(device)
    model = load_model(checkpoint_folder, resolve_dtype(dtype, target), target)
    model.requires_grad_(False)
    sums: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    for name in {slot.parameter for slot in where.values()}:
        parameter = model.get_parameter(name).requires_grad_(True)
        for kind in kinds:
            sums[kind][name] = torch.zeros(parameter.shape, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(_adder(name, sums))
    progress.start("gradients", len(token_ids), "samples")
    for index, sample in enumerate(token_ids):
        ids = sample[None].to(target)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not torch.isfinite(loss):
            raise UserError(f"The loss of calibration sample {index} is {loss.item()}; try dtype float32.")
        loss.backward()
        progress.advance(1, f"loss {loss.item():.3f}")
    progress.stop()
    return {
        kind: {name: _mean(slot.view(totals[slot.parameter]), len(token_ids), name) for name, slot in where.items()}
        for kind, totals in sums.items()
    }


def _adder(name: str, sums: dict[str, dict[str, torch.Tensor]]):
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        if "product" in sums:
            sums["product"][name] += (gradient * parameter.detach().float()).abs_().cpu()
        if "gradient" in sums:
            sums["gradient"][name] += gradient.abs_().cpu()

    return add


def _mean(total: torch.Tensor, samples: int, name: str) -> torch.Tensor:
    mean = total.div_(samples)  # in place: every slot is its own part of the accumulator
    if not bool(torch.isfinite(mean).all()):
        raise UserError(f"The gradients of {name} hold NaN or infinite values; try dtype float32.")
    return mean
