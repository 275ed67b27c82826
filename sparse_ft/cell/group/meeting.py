"""How the processes of a group meet, and how the leader tells the others what to do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sparse_ft.cell.group.launch import Address
from sparse_ft.cell.group.member import Member
from sparse_ft.cell.workbench import Workbench

__all__ = ["joined", "received", "tell"]

_LONGEST = timedelta(hours=1)  # of one exchange; a member that is gone is noticed at once
_IDLE = timedelta(days=100)  # between two orders


def joined(
    address: Address, rank: int, device_number: int, bench: Workbench, store: dist.Store | None = None
) -> tuple[Member, dist.ProcessGroup]:
    """This process as a member of a group, and the channel of the leader's orders.

    Args:
        address: where the group meets.
        rank: in it.
        device_number: of its GPU among those that it sees.
        bench: of the process.
        store: of the leader, who made it.
    """
    on_gpu = address.device == "cuda"
    if store is None:
        store = dist.TCPStore(address.host, address.port, is_master=False)
        store.set(f"here/{rank}", "")
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", device_number)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=address.size, timeout=_LONGEST
    )
    orders = dist.new_group(backend="gloo", timeout=_IDLE)
    mesh = init_device_mesh(address.device, (address.size,))
    return Member(rank, mesh, device, bench), orders


def tell(orders: dist.ProcessGroup, order: tuple[str, dict[str, Any]] | None) -> None:
    """The leader's: has all others do what a method of `Member` does, with these arguments; None: they end."""
    dist.broadcast_object_list([order], src=0, group=orders, device=torch.device("cpu"))


def received(orders: dist.ProcessGroup) -> tuple[str, dict[str, Any]] | None:
    """The others': the leader's next order."""
    order: list[Any] = [None]
    dist.broadcast_object_list(order, src=0, group=orders, device=torch.device("cpu"))
    return order[0]
