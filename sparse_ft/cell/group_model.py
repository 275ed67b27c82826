"""A model whose parameters lie with the members of a group, for whoever scores it without knowing of groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sparse_ft.cell.group.leader import Group

__all__ = ["GroupModel", "on_all"]


@dataclass(frozen=True)
class GroupModel:
    """The model of a group.

    Attributes:
        group: whose.
    """

    group: Group


@contextmanager
def on_all(model: torch.nn.Module | GroupModel, work: str, adapted: bool = False, **about: Any) -> Iterator[Any]:
    """The module to call, while the members of its group, where it has one, do the same.

    Args:
        model: to be called.
        work: of `sparse_ft.cell.group.member.Member`, for the others.
        adapted: the model with its adapter is meant.
        about: the work's arguments.

    Raises:
        MemberLostError: one of the group is gone.
    """
    if not isinstance(model, GroupModel):
        yield model
        return
    with model.group.together(work, **about):
        yield model.group.member.adapted if adapted else model.group.member.plain
