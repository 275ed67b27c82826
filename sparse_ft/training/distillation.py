"""A dense teacher: its logits and its blocks' outputs are matched, beside or instead of the labels.

SquareHead is of Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models"
(arXiv:2310.06927), section 3: each block's outputs at its own scale, so that no block outweighs the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_ft.training.collator import IGNORED, for_model

__all__ = ["Distillation", "kl_divergence", "squarehead"]


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Mean over the blocks of mean((s - t)^2) / mean(t^2).

    Args:
        student: outputs of each block, ``[B, T, H]``.
        teacher: the same of the teacher; no gradient reaches them.
        counted: bool ``[B, T]``: the tokens that are no padding.

    Returns:
        float32, a scalar; 0 where they are the same.
    """
    weight = counted[..., None].float()
    losses = []
    for s, t in zip(student, teacher, strict=True):
        target = t.detach().float()
        error = ((s.float() - target).square() * weight).sum()
        losses.append(error / (target.square() * weight).sum().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(losses).mean()


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, largest: int = 0) -> Tensor:
    """Mean over the tokens of KL(teacher || student), times the square of the temperature (Hinton et al. 2015).

    Args:
        student: logits ``[N, V]``.
        teacher: the same of the teacher; no gradient reaches them.
        temperature: both are divided by it.
        largest: compare the teacher's so many likeliest tokens, and all others as one; 0 (or V and more): every token.
            Never above the whole divergence, and takes memory for these alone beside the logits.

    Returns:
        float32, a scalar in nats.
    """
    s, t = student.float() / temperature, teacher.detach().float() / temperature
    s, t = functional.log_softmax(s, -1), functional.log_softmax(t, -1)
    if 0 < largest < s.shape[-1]:
        t, tokens = t.topk(largest, dim=-1)
        s = s.gather(-1, tokens)
        s, t = (torch.cat([part, _log_rest(part)], -1) for part in (s, t))
    return functional.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 - the sum of these probabilities), kept off minus infinity."""
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-6))


@dataclass
class Distillation:
    """Losses against a teacher, for a Trainer: ``ce`` x cross entropy + ``kl`` x KL + ``squarehead`` x SquareHead.

    Attributes:
        teacher: a model of the student's shapes, in eval mode, of which nothing is trained; or what is called as one
            is, and has its ``get_base_model`` (`sparse_ft.lora.whole.Lifted`).
        blocks: the path of the blocks in a plain model (`sparse_ft.models.families.Architecture.blocks`).
        ce, kl, squarehead: weights of the parts; what weighs 0 is not computed.
        temperature, largest: of the KL, see `kl_divergence`.
        parts: what each part was, batch by batch, unweighted; by name.
    """

    teacher: Any
    blocks: str
    ce: float = 1.0
    kl: float = 1.0
    squarehead: float = 1.0
    temperature: float = 1.0
    largest: int = 0
    parts: dict[str, list[float]] = field(default_factory=dict)

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The weighted loss of a batch of `AnswerCollator`.

        Args:
            model: the student; a PeftModel, or plain.
            inputs: with ``labels`` ``[B, K]`` of the last K positions (``logits_to_keep``).
        """
        labels, counted, inputs = inputs["labels"], inputs["attention_mask"].bool(), for_model(inputs)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with self._watched(model) as seen:
            output = model(**(inputs if self.ce else rest))
        with torch.no_grad(), self._watched(self.teacher) as known:
            taught = self.teacher(**rest)
        losses = {"ce": output.loss} if self.ce else {}
        if self.kl:
            # the logits before a label foretell it
            at = labels[:, 1:] != IGNORED
            pair = (logits[:, :-1][at] for logits in (output.logits, taught.logits))
            losses["kl"] = kl_divergence(*pair, self.temperature, self.largest)
        if self.squarehead:
            losses["squarehead"] = squarehead(seen, known, counted)
        for name, value in losses.items():
            self.parts.setdefault(name, []).append(float(value.detach()))
        return sum(getattr(self, name) * value for name, value in losses.items())

    @contextmanager
    def _watched(self, model: Any) -> Iterator[list[Tensor]]:
        """The blocks' outputs, in their order, of the forward passes inside."""
        outputs: list[Tensor] = []
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        blocks = plain.get_submodule(self.blocks) if self.squarehead else []
        hooks = [block.register_forward_hook(lambda *call: outputs.append(_hidden(call[-1]))) for block in blocks]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
