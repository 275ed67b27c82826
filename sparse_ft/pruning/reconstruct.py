"""Block reconstruction: the kept weights of a block are tuned until it gives out what the dense one does.

The error is that of the whole block, where SparseGPT, ALPS and refit see one matrix at a time. Nothing here knows a
model: a block is a function of its weights and of hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Reconstruction", "reconstruct", "samples_taken"]

_HELD_OUT = 0.1
_BETAS = (0.9, 0.95)
_CLIP = 1.0

Forward = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """A tuned block.

    Attributes:
        weights: float32 by name, exactly zero where the masks are False.
        before, after: mean squared error over mean square of the targets, on the samples held out.
        epoch: after which the weights were best; 0 if tuning did not help, and they are as they were.
        errors: on the samples held out, before the first and after every epoch.
    """

    weights: dict[str, torch.Tensor]
    before: float
    after: float
    epoch: int
    errors: tuple[float, ...]


def samples_taken(samples: int, epochs: int) -> int:
    """How many samples `reconstruct` goes through, forward only or with gradient."""
    judged = max(1, round(_HELD_OUT * samples))
    return judged * (epochs + 1) + epochs * max(1, samples - judged)


def reconstruct(
    forward: Forward,
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    epochs: int = 2,
    batch: int = 2,
    learning_rate: float = 2e-4,
    held_out: float = _HELD_OUT,
    seed: int = 0,
    advance: Callable[[int], None] = lambda samples: None,
) -> Reconstruction:
    """Minimises ||forward(weights, inputs) - targets||^2 over the kept weights by Adam; the best epoch counts.

    A function of its arguments alone: a run that was killed repeats a block and gets the same weights.

    Args:
        forward: (weights by name, hidden states ``[n, L, H]``) to the block's outputs ``[n, L, H]``, differentiable
            in the weights. What else the block is called with, and in which dtype it computes, is its own affair.
        weights: float, by name, on the device of the computation: the start. Not modified.
        masks: bool, of the weights' names and shapes, True = kept.
        inputs: ``[S, L, H]``: what enters the sparse block. May lie elsewhere, and in a file.
        targets: ``[S, L, H]``: what the dense block gives out; of the dense block's inputs, or of the same.
        epochs: passes over the samples; 0 changes nothing and measures the error.
        batch: samples a step.
        learning_rate: of Adam (betas 0.9, 0.95); falls linearly to 0. Gradients are clipped to norm 1.
        held_out: share of the samples on which epochs are compared (at least one); of a single sample, itself.
        seed: of the samples held out and of their order.
        advance: called with the number of samples after every batch, forward only or with gradient.

    Returns:
        the weights. Takes the memory of five float32 copies of them, and of a batch's activations.
    """
    kept = {name: masks[name].to(weight.device, torch.float32) for name, weight in weights.items()}
    tuned = {name: weight.detach().float() * kept[name] for name, weight in weights.items()}
    device = next(iter(tuned.values())).device
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    count = max(1, round(held_out * len(inputs)))
    judged, seen = order[:count], order[count:] if len(order) > 1 else order
    square = float(sum(part.float().square().sum(dtype=torch.float64) for part in targets.split(batch)))
    square = max(square / targets.numel(), torch.finfo(torch.float32).tiny)

    def pairs(samples: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for some in samples.split(batch):
            yield inputs[some].to(device), targets[some].to(device).float()
            advance(len(some))

    @torch.no_grad()
    def error() -> float:
        total = 0.0
        for x, y in pairs(judged):
            total += float((forward(tuned, x).float() - y).square().sum(dtype=torch.float64))
        return total / (len(judged) * targets[0].numel()) / square

    errors, epoch, best = [error()], 0, {name: value.clone() for name, value in tuned.items()}
    optimizer = torch.optim.Adam(tuned.values(), learning_rate, _BETAS)
    steps = max(1, epochs * math.ceil(len(seen) / batch))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for number in range(1, epochs + 1):
        for value in tuned.values():
            value.requires_grad_(True)
        for x, y in pairs(seen[torch.randperm(len(seen), generator=generator)]):
            with torch.enable_grad():
                loss = (forward(tuned, x).float() - y).square().mean() / square
                loss.backward()
            for name, value in tuned.items():
                if value.grad is not None:  # None: an expert that none of these tokens came to
                    value.grad.mul_(kept[name])
            torch.nn.utils.clip_grad_norm_(tuned.values(), _CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        for value in tuned.values():
            value.requires_grad_(False)
        errors.append(error())
        if errors[-1] < errors[epoch]:
            epoch, best = number, {name: value.clone() for name, value in tuned.items()}
        if not math.isfinite(errors[-1]):
            break
    return Reconstruction(best, errors[0], errors[epoch], epoch, tuple(errors))
