"""Does a mask set fit a model? Names and shapes, exactly; never by substring."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_ft.errors import UserError
from sparse_ft.masks.mask_set import MaskSet

__all__ = ["check_masks"]


def check_masks(masks: MaskSet, shapes: Mapping[str, tuple[int, ...]], where: str = "the model") -> None:
    """Checks that ``masks`` names exactly the prunable tensors ``shapes`` of a model, in their shapes.

    Raises:
        UserError: names that only one side has (both listed), or shapes that differ.
    """
    foreign = sorted(set(masks.shapes) - set(shapes))
    missing = sorted(set(shapes) - set(masks.shapes))
    if foreign or missing:
        raise UserError(
            f"The masks do not fit {where}: {_listed(foreign)} only in the masks, {_listed(missing)} only in"
            f" {where}. Use masks made from this architecture (compute_masks)."
        )
    wrong = [name for name in masks if masks.shapes[name] != tuple(shapes[name])]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"The masks do not fit {where}: {len(wrong)} shapes differ, the first is {name}: mask"
            f" {masks.shapes[name]}, weight {tuple(shapes[name])}. Use masks made from this architecture."
        )


def _listed(names: list[str], most: int = 5) -> str:
    if not names:
        return "no names"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} names ({', '.join(names[:most])}{more})"
