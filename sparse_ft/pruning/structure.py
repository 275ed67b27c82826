"""Structured pruning: which rows and columns go together, which go first, and how many.

Two kinds of units, each as wide as a physically smaller model has it: an MLP channel (a row of gate and up, the
matching column of down), and an attention group (a key/value head with all its query heads: rows of q, k and v,
columns of o). Every expert of a mixture, those that all tokens take, and the MLP of a dense block have channels of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_ft.models.families import CHANNELS, GROUPS, HEADS, architecture_of
from sparse_ft.models.names import role
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.kernels import add_column_sums
from sparse_ft.pruning.sources import KeySource, row_parts
from sparse_ft.pruning.streaming import MaskSink, Pool

__all__ = [
    "Channels",
    "Family",
    "Part",
    "block_counts",
    "choose_units",
    "families",
    "family_scores",
    "write_units",
]


@dataclass(frozen=True)
class Part:
    """A family's share of one tensor: unit u owns ``width`` indices of ``axis`` from ``start + u * width``.

    ``axis`` is ``row`` or ``column`` of the matrix.
    """

    name: str
    axis: str
    width: int = 1
    start: int = 0


@dataclass(frozen=True)
class Family:
    """Units of one kind in one block (and one expert).

    Attributes:
        kind: ``attention`` or ``mlp``.
        units: how many there are.
        unit_weights: weights in one unit, over all parts.
        field: of ``config.json``, which says how many units there are.
        times: so many units for each one of the field.
        routed: whether it is one of a mixture's routed experts.
    """

    block: int
    kind: str
    units: int
    unit_weights: int
    parts: tuple[Part, ...]
    field: str
    times: int = 1
    routed: bool = False


def families(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Family]:
    """All families of a model, from its config and the shapes of its prunable tensors."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    shares = {HEADS: heads // groups, GROUPS: 1, CHANNELS: 1}  # of each kind of line, in one unit
    experts = architecture_of(config).experts
    members: dict[tuple[int, str, str, int], list[Part]] = {}
    units: dict[tuple[int, str, str, int], int] = {}
    fields: dict[tuple[int, str, str, int], tuple[str, ...]] = {}
    for name, shape in shapes.items():
        what = role(config, name)
        projection, kind = what.map, "attention" if what.map.is_attention else "mlp"
        lines = shape[projection.axis == "column"]
        count = groups if projection.is_attention else lines // len(projection.parts)
        step = lines // count // sum(shares[part] for part in projection.parts)
        home = "" if what.expert is not None else projection.path.rpartition(".")[0]
        key, start = (what.block, kind, home, what.expert or 0), 0
        units[key] = count
        if projection.is_attention:
            fields[key] = ("num_key_value_heads",)
        else:
            fields[key] = projection.width if what.expert is None else (experts.width,)
        for part in projection.parts:
            width = step * shares[part]
            members.setdefault(key, []).append(Part(name, projection.axis, width, start))
            start += width * count
    result = []
    for key, parts in sorted(members.items()):
        across = [shapes[part.name][part.axis == "row"] for part in parts]
        weights = sum(part.width * length for part, length in zip(parts, across, strict=True))
        field, *times = fields[key]
        many, routed = math.prod(config[other] for other in times), key[1] == "mlp" and not key[2]
        result.append(Family(*key[:2], units[key], weights, tuple(parts), field, many, routed))
    return result


def family_scores(
    members: Sequence[Family], source: KeySource, threads: int = 1, progress: Progress = SILENT
) -> list[np.ndarray]:
    """Mean score per weight of every unit, float64 ``[units]`` for each family.

    Sums run in float64 in a fixed order, so that threads do not change them.
    """
    needed = {(part.name, part.axis) for family in members for part in family.parts}
    tasks = {name: _sums_task(source, name, {axis for n, axis in needed if n == name}) for name, _ in needed}
    sums: Mapping[str, Any] = Pool(source, threads, progress).run("score units", tasks)
    scores = []
    for family in members:
        total = np.zeros(family.units)
        for part in family.parts:
            lines = sums[part.name][part.axis][part.start : part.start + family.units * part.width]
            total += lines.reshape(family.units, part.width).sum(axis=1)
        scores.append(total / family.unit_weights)
    return scores


@dataclass(frozen=True)
class Channels:
    """The MLP channels of a block that one field of ``config.json`` counts.

    Attributes:
        count: the value of the field.
        weights: of one channel, over all experts.
        together: channels go in such bundles; must divide ``count``.
    """

    count: int
    weights: int
    together: int = 1


def block_counts(
    sparsity: float, groups: int, group_weights: int, channels: Sequence[Channels]
) -> tuple[int, tuple[int, ...]]:
    """How many attention groups and MLP channels of a block go, the same for every block of its kind.

    Groups go in proportion; they are few and large, so the channels make up the difference, those of every field
    alike: the block comes within half a channel (half a bundle) of each from the level. A channel once gone stays
    gone at higher levels, so right after a group has gone (at sparsity (j - 1/2) / groups) the block is up to one
    group too sparse. Below 1.0 every block keeps one group and one channel of every field.

    Args:
        channels: at least one.

    Returns:
        pruned groups, pruned channels of every field; all grow with ``sparsity``.
    """
    if sparsity >= 1:
        return groups, tuple(kind.count for kind in channels)
    whole = sum(kind.count * kind.weights for kind in channels)
    total = groups * group_weights + whole
    gone = min(max(0, math.ceil(sparsity * groups - 0.5)), groups - 1)
    wanted = [sparsity * total - gone * group_weights]
    wanted += [(j - 0.5) / groups * total - (j - 1) * group_weights for j in range(1, gone + 1)]
    pruned = []
    for kind in channels:
        share = kind.count * kind.weights / whole  # 1 where there is one field
        bundles = round(max(wanted) * share / (kind.weights * kind.together))
        pruned.append(kind.together * min(max(0, bundles), kind.count // kind.together - 1))
    return gone, tuple(pruned)


def choose_units(
    members: Sequence[Family], scores: Sequence[np.ndarray], levels: Sequence[float], scope: str
) -> list[list[np.ndarray]]:
    """Which units stay: for each level and family a boolean ``[units]``, nested over the levels.

    ``layer``: the lowest of each family, as many as `block_counts` says. ``global``: one ranking of all units
    by mean score per weight; of its prefixes the one nearest to the level. Ties by position.
    """
    if scope == "global":
        return _globally(members, scores, levels)
    beside: dict[int, list[Family]] = {}
    for family in members:
        beside.setdefault(family.block, []).append(family)
    kept = []
    for level in levels:
        gone = {block: _gone(level, families) for block, families in beside.items()}
        kept.append(
            [
                _keep_all_but(values, family.times * gone[family.block][family.field])
                for family, values in zip(members, scores, strict=True)
            ]
        )
    return kept


def _gone(level: float, block: Sequence[Family]) -> dict[str, int]:
    """How many units of a block go, by the field that counts them."""
    attention = next(family for family in block if family.kind == "attention")
    fields: dict[str, list[Family]] = {}
    for family in block:
        if family.kind == "mlp":
            fields.setdefault(family.field, []).append(family)
    channels = []
    for families in fields.values():
        count, routed = families[0].units // families[0].times, any(family.routed for family in families)
        weights = sum(family.times * family.unit_weights for family in families)
        # torch's grouped matrix product, which runs experts, wants rows of a multiple of 16 bytes
        channels.append(Channels(count, weights, 8 if routed and len(families) > 1 and count % 8 == 0 else 1))
    groups, counts = block_counts(level, attention.units, attention.unit_weights, channels)
    return {attention.field: groups, **dict(zip(fields, counts, strict=True))}


def write_units(
    members: Sequence[Family],
    kept: Sequence[Sequence[np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    sink: MaskSink,
) -> None:
    """Writes the masks: a weight stays if its row and its column stay."""
    for level, choices in enumerate(kept):
        lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for family, choice in zip(members, choices, strict=True):
            for part in family.parts:
                rows, columns = (np.ones(lines, bool) for lines in shapes[part.name])
                rows, columns = lines.setdefault(part.name, (rows, columns))
                axis = rows if part.axis == "row" else columns
                axis[part.start : part.start + family.units * part.width] = np.repeat(choice, part.width)
        for name in sorted(lines):
            rows, columns = lines[name]
            pattern = np.packbits(columns, bitorder="little")
            for first, last, _ in row_parts(shapes[name]):
                sink.append(level, name, np.where(rows[first:last, None], pattern, np.uint8(0)))


def _sums_task(source: KeySource, name: str, axes: set[str]):
    """Sums of |score| over each row and column: ``{axis: float64 [lines]}``."""

    def task() -> dict[str, np.ndarray]:
        rows, columns = (np.zeros(lines) for lines in source.shapes[name])
        begin = 0
        for part in source.scores(name):
            if "row" in axes:
                rows[begin : begin + len(part)] = part.sum(axis=1, dtype=np.float64)
            if "column" in axes:
                add_column_sums(part, columns)
            begin += len(part)
        return {"row": rows, "column": columns}

    return task


def _keep_all_but(scores: np.ndarray, count: int) -> np.ndarray:
    kept = np.ones(scores.size, bool)
    kept[np.argsort(scores, kind="stable")[:count]] = False
    return kept


def _globally(
    members: Sequence[Family], scores: Sequence[np.ndarray], levels: Sequence[float]
) -> list[list[np.ndarray]]:
    order = np.argsort(np.concatenate(scores), kind="stable")
    weights = np.concatenate([np.full(family.units, family.unit_weights) for family in members])
    ends = np.concatenate([[0], np.cumsum(weights[order])])
    borders = np.cumsum([family.units for family in members])[:-1]
    kept = []
    for level in levels:
        count = int(np.abs(ends - level * ends[-1]).argmin())
        keep = np.ones(order.size, bool)
        keep[order[:count]] = False
        kept.append(np.split(keep, borders))
    return kept
