"""Is a checkpoint as sparse as its masks say? Weight by weight, streaming, without building the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet, unpacked
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.mixtures import refitted
from sparse_ft.models.names import place, role
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

__all__ = ["LayerCheck", "Validation", "validate_checkpoint"]

_BLOCK = 1 << 18  # weights looked at in one go: what is made of them stays in the processor's cache
# The bits of infinity, by torch's name of the type. Read as whole numbers, without the sign, which is the highest bit,
# weights are in the order of their magnitudes, and what is above infinity is NaN.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
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
        masks: by the checkpoint's tensor names (experts may be fused on either side). Of experts of which they keep no
            weight the checkpoint may have none: what is not there is pruned.
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
    fitted = _fitted(checkpoint, masks)
    whole = {name: _Bits(fitted.bits[name], fitted.shapes[name][-1]) for name in fitted}
    gone = masks.n_weights - fitted.n_weights  # of experts that the checkpoint does not have any more
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
                dtype = checkpoint.dtype_name(name)
                if dtype in _INFINITY and any(_nonfinite(bits, dtype) for _, bits in _blocks(checkpoint, name)):
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
    weights = gone + sum(layer.weights for layer in layers)
    masked = gone + sum(layer.masked for layer in layers)
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

    def __init__(self, packed: np.ndarray, columns: int) -> None:
        self.packed, self.columns = packed.reshape(-1, packed.shape[-1]), columns

    def rows(self, begin: int, end: int) -> np.ndarray:
        return unpacked(self.packed[begin:end], self.columns)


def _fitted(checkpoint: Checkpoint, masks: MaskSet) -> MaskSet:
    """The masks by the checkpoint's names; see `refitted`."""
    shapes = checkpoint.prunable_shapes()
    masks = refitted(checkpoint.config, masks, shapes)
    check_masks(masks, shapes, f"the checkpoint {checkpoint.folder}")
    return masks


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """``(first row, bits [rows, C])`` of a tensor, a bounded number of weights at a time; a weight's bits are one
    unsigned number."""
    shape, raw = checkpoint.shape(name), checkpoint.raw(name)
    columns, itemsize = (shape or (1,))[-1], raw.size // max(1, math.prod(shape))
    width = columns * itemsize
    step = max(1, _BLOCK // columns)
    for row in range(0, raw.size // width, step):
        block = np.array(raw[row * width : (row + step) * width])  # a copy: the file is mapped
        yield row, block.view(f"u{itemsize}").reshape(-1, columns)


def _check_layer(checkpoint: Checkpoint, name: str, mask: _Bits, tolerance: float) -> LayerCheck:
    shape, dtype = checkpoint.shape(name), checkpoint.dtype_name(name)
    check = LayerCheck(name, weights=math.prod(shape), masked=0)
    largest = 0.0
    for row, bits in _blocks(checkpoint, name):
        masked = ~mask.rows(row, row + len(bits))
        magnitudes = _magnitudes(bits)
        nonzero = magnitudes != 0  # true of NaN
        check.masked += int(np.count_nonzero(masked))
        check.zeros += bits.size - int(np.count_nonzero(nonzero))
        check.nonfinite += _nonfinite(bits, dtype)
        wrong = masked & (nonzero if tolerance == 0 else ~(_values(magnitudes, dtype).astype(np.float32) <= tolerance))
        count = int(np.count_nonzero(wrong))
        if not count:
            continue
        check.violations += count
        extreme = float(_values(np.where(wrong, magnitudes, 0).max(keepdims=True).astype(bits.dtype), dtype)[0, 0])
        largest = max(largest, extreme if math.isfinite(extreme) else math.inf)
        for where in np.flatnonzero(wrong)[: _EXAMPLES - len(check.examples)].tolist():
            r, c = divmod(where, bits.shape[1])
            value = float(_values(bits[r : r + 1, c : c + 1], dtype)[0, 0])
            index = [*_unravel(row + r, shape[:-1]), c]
            check.examples.append({"index": index, "value": value if math.isfinite(value) else str(value)})
    if check.violations and math.isfinite(largest):
        check.max_violation = largest
    return check


def _magnitudes(bits: np.ndarray) -> np.ndarray:
    """Bits without the sign."""
    return bits & (np.iinfo(bits.dtype).max >> 1)


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that the bits stand for, as floats of 32 or more bits: exact."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "float16" else bits.view(dtype)


def _nonfinite(bits: np.ndarray, dtype: str) -> int:
    """Number of NaN and infinite weights."""
    magnitudes = _magnitudes(bits)
    if bits.size == 0 or magnitudes.max() < _INFINITY[dtype]:
        return 0
    return int(np.count_nonzero(magnitudes >= _INFINITY[dtype]))


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
    extra, lost = (
        {name for name in one.names if place(one.config, name).parameter not in there} - {row.head_weight}
        for one, there in ((checkpoint, _parameters(base)), (base, _parameters(checkpoint)))
    )
    return (
        untied
        + [f"Tensor {name} is not in the base checkpoint." for name in sorted(extra)[:5]]
        + [f"Tensor {name} of the base checkpoint is gone." for name in sorted(lost)[:5]]
    )


def _parameters(checkpoint: Checkpoint) -> set[str]:
    """Where its tensors live: a mixture, its router too, may be named in two ways."""
    return {place(checkpoint.config, name).parameter for name in checkpoint.names}


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
    changed, dtype, before = 0, checkpoint.dtype(name), base.dtype(name)
    for (row, bits), (_, original) in zip(_blocks(checkpoint, name), _blocks(base, name), strict=True):
        different = (_tensor(bits, dtype) != _tensor(original, before).to(dtype)).numpy()  # torch's own rounding
        if name in whole:
            different &= whole[name].rows(row, row + len(bits))
        changed += int(np.count_nonzero(different))
    return [f"{name} differs from the base in {changed} weights; it was not to be trained."] if changed else []


def _tensor(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.from_numpy(bits.view(np.uint8)).view(dtype)


def _tie_problems(checkpoint: Checkpoint) -> list[str]:
    row, names = architecture_of(checkpoint.config), set(checkpoint.names)
    embedding, head = row.embedding_weight, row.head_weight
    if not checkpoint.config.get("tie_word_embeddings", False) or not {embedding, head} <= names:
        return [] if head in names or checkpoint.config.get("tie_word_embeddings") else [f"{head} is missing."]
    if checkpoint.shape(embedding) == checkpoint.shape(head):
        dtypes = checkpoint.dtype_name(embedding), checkpoint.dtype_name(head)
        pairs = zip(_blocks(checkpoint, embedding), _blocks(checkpoint, head), strict=True)
        if all(np.array_equal(_values(a, dtypes[0]), _values(b, dtypes[1])) for (_, a), (_, b) in pairs):
            return []
    return [f"The config ties {row.head} to the embeddings, but their weights differ."]
