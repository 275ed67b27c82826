"""Which fractions of its experts a mixture can lose. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_ft.errors import UserError
from sparse_ft.masks.histogram import exact_count
from sparse_ft.models.families import architecture_of

__all__ = ["check_levels"]


def check_levels(config: Mapping[str, Any], levels: Sequence[float]) -> None:
    """Refuses levels that leave a router less than it needs, and models whose experts cannot go.

    Raises:
        UserError: no mixture, a router that knows groups of experts, or a level that is too high; names the largest
            that works.
    """
    row = architecture_of(config)
    experts = row.experts
    if experts is None or not any(row.mixes(config, block) for block in range(config["num_hidden_layers"])):
        raise UserError(f"method experts: a {row.model_type} model has no experts. Take another method.")
    if (groups := config.get(experts.groups, 1) or 1) > 1:
        raise UserError(
            f"method experts: the router parts the experts into {groups} groups ({experts.groups}), which have to stay"
            " of one size. Take another method."
        )
    number, least = experts.number(config), experts.least(config)
    if too_high := [level for level in levels if number - exact_count(level, number) < least]:
        largest = (number - least) / number
        raise UserError(
            f"method experts, sparsity {too_high[0]:g}: {exact_count(too_high[0], number)} of {number} experts would"
            f" go, and a block keeps at least {least}, which its router needs. The largest level is {largest:g}."
        )
