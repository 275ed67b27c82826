"""Is a checkpoint as sparse as its masks say? Weight by weight, streaming, without building the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet, unpack_bits
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import parameter_masks, role, slots
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.progress import SILENT, Progress

__all__ = ["LayerCheck", "Validation", "validate_checkpoint"]

_BLOCK = 1 << 18  # weights looked at in one go: what is made of them stays in the processor's cache
_EXAMPLES = 3  # violating weights that a layer's entry shows


@dataclass
class LayerCheck:
    """One masked tensor: counts of weights, and the first violations.

    Attributes:
        violations: masked weights that are not zero (magnitude above the tolerance, or NaN).
        max_violation: the largest magnitude among them; None without any, or where it is not finite.
        zeros: weights that are exactly zero, masked or not.
        nonfinite: NaN and infinite weights.
        examples: the first violations, ``{"index": [...], "value": ...}``.
    """

    name: str
    weights: int
    masked: int
    violations: int = 0
    max_violation: float | None = None
    zeros: int = 0
    nonfinite: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Validation:
    """What the check found.

    Attributes:
        ok: no problem of any kind.
        violations: masked weights that are not zero, over all tensors.
        sparsity: fraction of the prunable weights that are masked and zero.
        sparsity_masks: fraction that the masks prune; equal to ``sparsity`` when nothing is violated.
        sparsity_asked: what the masks' maker was asked for, where they say so.
        problems: one sentence each.
    """

    checkpoint: str
    mask_checksum: str
    tolerance: float
    ok: bool
    violations: int
    sparsity: float
    sparsity_masks: float
    sparsity_asked: float | None
    per_layer: list[LayerCheck]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a terminal: the verdict, the problems, and every violated tensor."""
        verdict = "ok" if self.ok else "NOT ok"
        lines = [
            f"{self.checkpoint}: {verdict}, sparsity {self.sparsity:.6f} (masks {self.sparsity_masks:.6f}),"
            f" {self.violations} violations in {len(self.per_layer)} tensors"
        ]
        lines += [f"  {problem}" for problem in self.problems]
        for layer in self.per_layer:
            if layer.violations:
                first = ", ".join(f"{entry['index']} = {entry['value']}" for entry in layer.examples)
                lines.append(f"  {layer.name}: {layer.violations} of {layer.masked} masked weights ({first})")
        return lines


def validate_checkpoint(
    folder: str | Path,
    masks: MaskSet,
    tolerance: float = 0.0,
    progress: Progress = SILENT,
    base: str | Path | None = None,
    target_modules: Collection[str] | None = None,
) -> Validation:
    """Checks a merged checkpoint against its masks.

    Every masked weight is zero; the sparsity is the one asked for; all weights are finite; tied embeddings are
    still tied; and, against ``base``, no tensor changed that an adapter had no business with.

    Args:
        folder: a Hugging Face checkpoint, or a Cerebras one (``.mdl``).
        masks: by the checkpoint's tensor names (experts may be fused on either side).
        tolerance: largest magnitude that counts as zero.
        base: the checkpoint that training started from: embeddings, norms, head and router must be its bits
            (rounded to the merged checkpoint's dtype). None where they were trained too (mode ``full``).
        target_modules: with ``base``, the projections that were adapted; kept weights of the others must be
            those of the base. None: all were.

    Returns:
        a `Validation`; violations are a result, no error.

    Raises:
        UserError: a folder that is no checkpoint, masks that do not fit it, a negative tolerance.
    """
    if not tolerance >= 0:
        raise UserError(f"tolerance is {tolerance}; it must be 0 or more.")
    checkpoint = open_checkpoint(folder)
    checkpoint.check()
    whole = _check_fit(checkpoint, masks)
    origin = None if base is None else open_checkpoint(base)
    problems = _asked_problems(masks)
    if origin is not None:
        problems += _name_problems(checkpoint, origin)
    layers = []
    progress.start("validate", sum(checkpoint.nbytes(name) for name in checkpoint.names), "B")
    try:
        for name in checkpoint.names:
            if name in whole:
                layers.append(_check_layer(checkpoint, name, whole[name], tolerance))
                if layers[-1].nonfinite:
                    problems.append(f"{name} has {layers[-1].nonfinite} weights that are not finite.")
            else:
                if checkpoint.dtype(name).is_floating_point and any(
                    _nonfinite(weights) for _, weights in _blocks(checkpoint, name)
                ):
                    problems.append(f"{name} has weights that are not finite.")
            if origin is not None and name in origin.names:
                problems += _change_problems(checkpoint, origin, name, whole, target_modules)
            progress.advance(checkpoint.nbytes(name))
    finally:
        progress.stop()
    problems += _tie_problems(checkpoint)
    violations = sum(layer.violations for layer in layers)
    if violations:
        touched = sum(1 for layer in layers if layer.violations)
        problems.insert(0, f"{violations} masked weights in {touched} tensors are not zero.")
    weights = sum(layer.weights for layer in layers)
    masked = sum(layer.masked for layer in layers)
    return Validation(
        checkpoint=str(folder),
        mask_checksum=masks.checksum,
        tolerance=tolerance,
        ok=not problems,
        violations=violations,
        sparsity=(masked - violations) / weights if weights else 0.0,
        sparsity_masks=masks.sparsity,
        sparsity_asked=_asked(masks),
        per_layer=layers,
        problems=problems,
    )


class _Bits:
    """The mask of one checkpoint tensor, row block by row block (rows: all axes but the last)."""

    def __init__(self, packed: Tensor, columns: int) -> None:
        self.packed, self.columns = packed.reshape(-1, packed.shape[-1]), columns

    def rows(self, begin: int, end: int) -> Tensor:
        return unpack_bits(self.packed[begin:end], self.columns)


def _check_fit(checkpoint: Checkpoint, masks: MaskSet) -> dict[str, _Bits]:
    """The masks by the checkpoint's names; a set with fused experts also fits single ones, and the reverse."""
    shapes = checkpoint.prunable_shapes()
    if set(shapes) != set(masks.shapes):
        masks = _renamed(checkpoint, masks, shapes) or masks
    check_masks(masks, shapes, f"the checkpoint {checkpoint.folder}")
    return {name: _Bits(masks.packed[name], shapes[name][-1]) for name in masks}


def _renamed(checkpoint: Checkpoint, masks: MaskSet, shapes: dict[str, tuple[int, ...]]) -> MaskSet | None:
    try:
        places, here = slots(checkpoint.config, masks), slots(checkpoint.config, shapes)
        if {slot.parameter for slot in places.values()} != {slot.parameter for slot in here.values()}:
            return None
        fused = parameter_masks(checkpoint.config, masks)
        return MaskSet.from_bool({name: slot.view(fused[slot.parameter]) for name, slot in here.items()})
    except (ValueError, IndexError, RuntimeError):  # names or shapes of another architecture
        return None


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """``(first row, weights [rows, C])`` of a tensor, a bounded number of weights at a time."""
    columns, dtype, raw = (checkpoint.shape(name) or (1,))[-1], checkpoint.dtype(name), checkpoint.raw(name)
    width = columns * dtype.itemsize
    step = max(1, _BLOCK // columns)
    for row in range(0, raw.size // width, step):
        block = torch.tensor(raw[row * width : (row + step) * width])  # a copy: the file is mapped read-only
        yield row, block.view(dtype).view(-1, columns)


def _check_layer(checkpoint: Checkpoint, name: str, bits: _Bits, tolerance: float) -> LayerCheck:
    shape = checkpoint.shape(name)
    check = LayerCheck(name, weights=math.prod(shape), masked=0)
    largest = 0.0
    for row, weights in _blocks(checkpoint, name):
        masked = ~bits.rows(row, row + weights.shape[0])
        nonzero = weights != 0  # true of NaN
        check.masked += _count(masked)
        check.zeros += weights.numel() - _count(nonzero)
        check.nonfinite += _nonfinite(weights)
        wrong = masked & (nonzero if tolerance == 0 else ~(weights.abs().float() <= tolerance))
        count = _count(wrong)
        if not count:
            continue
        check.violations += count
        violating = torch.where(wrong, weights, 0)  # picking them out one by one takes several times as long
        extremes = [abs(float(extreme)) for extreme in torch.aminmax(violating)]  # NaN if any is
        largest = max(largest, *(value if math.isfinite(value) else math.inf for value in extremes))
        if len(check.examples) < _EXAMPLES:
            for r, c in wrong.nonzero()[: _EXAMPLES - len(check.examples)].tolist():
                value = float(weights[r, c])
                place = [*_unravel(row + r, shape[:-1]), c]
                check.examples.append({"index": place, "value": value if math.isfinite(value) else str(value)})
    if check.violations and math.isfinite(largest):
        check.max_violation = largest
    return check


def _count(found: Tensor) -> int:
    return int(np.count_nonzero(found.numpy()))  # several times faster than a sum over booleans


def _nonfinite(weights: Tensor) -> int:
    """Number of NaN and infinite weights. The extremes tell where there are none: NaN is among them if anywhere."""
    if weights.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(weights)):
        return 0
    return weights.numel() - _count(torch.isfinite(weights))


def _unravel(row: int, shape: tuple[int, ...]) -> list[int]:
    index = []
    for size in reversed(shape):
        row, rest = divmod(row, size)
        index.append(rest)
    return index[::-1]


def _asked(masks: MaskSet) -> float | None:
    asked = masks.metadata.get("sparsity")
    return float(asked) if isinstance(asked, (int, float)) else None


def _asked_problems(masks: MaskSet) -> list[str]:
    """Whether the masks prune what they were asked to, up to the rounding of each scope's count.

    Structured masks remove whole units, so what they reach is only comparable with what their maker said.
    """
    metadata, problems = masks.metadata, []
    achieved = metadata.get("achieved")
    if isinstance(achieved, (int, float)) and abs(achieved - masks.sparsity) > 1e-6:
        problems.append(f"The masks say they reach sparsity {achieved:.6f}; they have {masks.sparsity:.6f}.")
    asked = _asked(masks)
    if asked is None or metadata.get("method") not in ("unstructured", "random", "semi_structured"):
        return problems
    rows = sum(math.prod(shape[:-1]) for shape in masks.shapes.values())
    groups = {"global": 1, "layer": len(masks), "row": rows}.get(str(metadata.get("scope")), len(masks))
    if metadata["method"] == "semi_structured":
        groups = 16 * rows  # a row's rest that fills no group stays dense
    allowed = 0.5 * groups + 1 + (0.005 * masks.n_weights if metadata.get("allocation", "uniform") != "uniform" else 0)
    if abs(masks.n_pruned - asked * masks.n_weights) > allowed:
        problems.append(f"The masks were asked for sparsity {asked:.6f} and have {masks.sparsity:.6f}.")
    return problems


def _name_problems(checkpoint: Checkpoint, base: Checkpoint) -> list[str]:
    ties = [bool(which.config.get("tie_word_embeddings")) for which in (checkpoint, base)]
    row = architecture_of(base.config)
    untied = [f"The base ties {row.head} to the embeddings, this checkpoint does not."] if ties == [False, True] else []
    extra = set(checkpoint.names) - set(base.names) - {row.head_weight}
    lost = set(base.names) - set(checkpoint.names) - {row.head_weight}
    if row.experts is not None:  # a mixture may be named in two ways; its router goes with its experts
        ways = tuple(f".{mixture}." for mixture in (row.experts.module, row.experts.stored))
        extra, lost = ({n for n in names if not any(way in n for way in ways)} for names in (extra, lost))
    return (
        untied
        + [f"Tensor {name} is not in the base checkpoint." for name in sorted(extra)[:5]]
        + [f"Tensor {name} of the base checkpoint is gone." for name in sorted(lost)[:5]]
    )


def _change_problems(
    checkpoint: Checkpoint,
    base: Checkpoint,
    name: str,
    whole: dict[str, _Bits],
    target_modules: Collection[str] | None,
) -> list[str]:
    if name in whole and role(base.config, name).is_adapted(target_modules):
        return []
    if checkpoint.shape(name) != base.shape(name):
        return [f"{name} has shape {checkpoint.shape(name)}, in the base {base.shape(name)}."]
    changed = 0
    for (row, weights), (_, original) in zip(_blocks(checkpoint, name), _blocks(base, name), strict=True):
        different = weights != original.to(weights.dtype)
        if name in whole:
            different &= whole[name].rows(row, row + weights.shape[0])
        changed += _count(different)
    return [f"{name} differs from the base in {changed} weights; it was not to be trained."] if changed else []


def _tie_problems(checkpoint: Checkpoint) -> list[str]:
    row, names = architecture_of(checkpoint.config), set(checkpoint.names)
    embedding, head = row.embedding_weight, row.head_weight
    if not checkpoint.config.get("tie_word_embeddings", False) or not {embedding, head} <= names:
        return [] if head in names or checkpoint.config.get("tie_word_embeddings") else [f"{head} is missing."]
    if torch.equal(checkpoint.tensor(embedding), checkpoint.tensor(head)):
        return []
    return [f"The config ties {row.head} to the embeddings, but their weights differ."]
