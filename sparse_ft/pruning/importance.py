"""How much a weight matters: scores of single weights, large = keep. Tensors in, tensors out, in float32.

A user's own importance is a callable ``(weight, statistics) -> scores`` of the weight's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Importance", "Statistics", "gradient", "magnitude", "score", "taylor", "wanda", "with_floor"]

_FLOOR = 1e-30  # scales magnitudes below every score that a float32 sum of activations can give


@dataclass(frozen=True)
class Statistics:
    """What calibration text says about one tensor; None where it was not gathered.

    Attributes:
        name: the checkpoint's tensor name.
        input_norm: Euclidean norm of each input feature over all tokens, float32 ``[C]``.
        tokens: number of tokens that went through.
        mean_abs_gradient: mean over samples of |g|, float32, of the weight's shape.
        mean_abs_product: mean over samples of |w*g|, likewise.
    """

    name: str
    input_norm: torch.Tensor | None = None
    tokens: int = 0
    mean_abs_gradient: torch.Tensor | None = None
    mean_abs_product: torch.Tensor | None = None


Importance = Callable[[torch.Tensor, Statistics], torch.Tensor]


def magnitude(weight: torch.Tensor, statistics: Statistics | None = None) -> torch.Tensor:
    """|w|."""
    return weight.float().abs()


def gradient(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Mean over calibration samples of |g|, g the gradient of a sample's loss."""
    assert statistics.mean_abs_gradient is not None
    return statistics.mean_abs_gradient


def taylor(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Mean over calibration samples of |w*g|: the loss of removing w, to first order.

    Molchanov et al.: Importance estimation for neural network pruning (CVPR 2019), per weight.
    """
    assert statistics.mean_abs_product is not None
    return statistics.mean_abs_product


def wanda(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """|w| * ||x||_2, x the input feature that w multiplies. Sun et al. 2023, arXiv:2306.11695."""
    assert statistics.input_norm is not None
    return weight.float().abs() * statistics.input_norm.to(weight.device)


def score(function: Importance, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Scores of one tensor by a rule's function or a user's own, as float32 of the weight's shape.

    Raises:
        ValueError: the function returned something else than float scores of that shape.
    """
    scores = function(weight, statistics)
    if not isinstance(scores, torch.Tensor) or scores.shape != weight.shape or not scores.is_floating_point():
        raise ValueError(
            f"importance {getattr(function, '__name__', function)} must return float scores of shape"
            f" {tuple(weight.shape)} for {statistics.name}, not {getattr(scores, 'shape', type(scores))}"
        )
    return scores.detach().float()


def with_floor(scores: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Orders by magnitude what no token has reached.

    A matrix whose scores are all zero (an expert that the calibration text never visits) has no order of
    its own. It gets |w| * 1e-30, which stays below every other score.

    Args:
        scores: float32 ``[R, C]``.

    Returns:
        the scores, and whether the matrix needed it.
    """
    if bool(scores.any()):
        return scores, False
    return weight.float().abs() * _FLOOR, True
