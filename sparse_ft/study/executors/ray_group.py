"""A cell's group on a Ray cluster: the worker's actor leads, and others in its placement group follow."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sparse_ft.cell.group.launch import Address

__all__ = ["RayLaunch", "in_bundle"]


class RayLaunch:
    """Starts actors in the bundles of the placement group that this process's actor is in.

    Args:
        asked: what each actor asks of its node: options of ``ray.remote``.
    """

    def __init__(self, asked: dict[str, Any]):
        self._asked, self.host = asked, ray.util.get_node_ip_address()

    def __call__(self, address: Address) -> RayMembers:
        """Starts one for every bundle but the first."""
        return RayMembers(address, self._asked)


class RayMembers:
    """The actors that follow a leader; they end with the actor that made them.

    Args:
        address: where they meet.
        asked: of a node.

    Attributes:
        lost: set when one of them has ended.
        how: how that was.
    """

    def __init__(self, address: Address, asked: dict[str, Any]):
        self.lost, self.how = threading.Event(), ""
        place, kind = get_current_placement_group(), ray.remote(max_restarts=0, **asked)(_Follower)
        ranks = range(1, address.size)
        self._actors = [kind.options(scheduling_strategy=in_bundle(place, rank)).remote() for rank in ranks]
        self._ends = [actor.follow.remote(address, rank) for rank, actor in zip(ranks, self._actors, strict=True)]
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self, seconds: float) -> None:
        """Waits so long for them to end by themselves, and kills them."""
        ray.wait(self._ends, num_returns=len(self._ends), timeout=seconds)
        for actor in self._actors:
            with suppress(Exception):
                ray.kill(actor)

    def _watch(self) -> None:
        (first,), _ = ray.wait(self._ends, num_returns=1)
        rank = self._ends.index(first) + 1
        try:
            ray.get(first)
            self.how = "a process of the group has ended"
        except Exception as error:
            said = str(error).strip().splitlines()[0]
            self.how = f"process {rank + 1} of the group's {len(self._ends) + 1} is gone: {said}"
        self.lost.set()


class _Follower:
    """A process that does as a leader says, on whatever node its bundle is."""

    def follow(self, address: Address, rank: int) -> None:
        """Joins the group, and returns when the leader has it end."""
        from sparse_ft.cell.group.follow import follow

        follow(address, rank, 0)  # Ray shows an actor its own GPU alone


def in_bundle(place: Any, number: int) -> PlacementGroupSchedulingStrategy:
    """Puts an actor into one bundle of a placement group."""
    return PlacementGroupSchedulingStrategy(placement_group=place, placement_group_bundle_index=number)
