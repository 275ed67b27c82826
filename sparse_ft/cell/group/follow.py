"""A process of a group that does as its leader says: ``python -m sparse_ft.cell.group.follow``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from sparse_ft.cell.group.launch import Address

__all__ = ["follow", "main"]


def follow(address: Address, rank: int, device_number: int) -> None:
    """Joins the group and does what its leader says, until it is told to end or the leader is gone.

    Args:
        address: where the group meets.
        rank: in the group, from 1.
        device_number: of its GPU among those that it sees.
    """
    import torch
    import torch.distributed as dist

    from sparse_ft.cell.group.meeting import joined, received
    from sparse_ft.cell.workbench import Workbench

    torch.set_num_threads(address.threads)
    member, orders = joined(address, rank, device_number, Workbench())
    try:
        while (order := received(orders)) is not None:
            work, about = order
            getattr(member, work)(**about)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """A process of torch's elastic agent: its rank is in its environment, everything else on the command line."""
    host, port, size, device, threads, leader, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the leader too, which ends its group itself
    threading.Thread(target=_end_with, args=(int(leader),), daemon=True).start()
    rank = int(os.environ["RANK"]) + 1
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    follow(Address(host, int(port), int(size), device, int(threads)), rank, rank)
    os._exit(0)  # nothing is left to be done, and taking libraries down takes seconds


def _end_with(leader: int) -> None:
    while os.getppid() == leader:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
