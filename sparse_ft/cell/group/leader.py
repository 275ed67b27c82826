"""The process of a group that leads: it runs the cell, tracks and writes, and has the others do their part."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_ft.cell.failures import MemberLostError
from sparse_ft.cell.group.launch import Address, LocalMembers, Members
from sparse_ft.cell.group.meeting import joined, tell
from sparse_ft.cell.group_model import GroupModel
from sparse_ft.cell.start import Start
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.devices import missing_gpus, resolve_device
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig

__all__ = ["Group", "group_of", "lent_by_group"]

_NOTICED = 10.0  # seconds in which the agent notices that a process is gone
_ENDING = 10.0  # seconds in which a process that was told to end has ended
# What gloo and NCCL say when the other end is gone.
_CUT_OFF = re.compile(r"gloo|Gloo|NCCL|nccl|[Cc]onnection|peer|[Tt]imed out|Broken pipe|process group|store")


class Group:
    """A group that this process leads.

    Args:
        size: of the group, this process among it.
        device: cpu or cuda.
        bench: of this process.
    """

    def __init__(self, size: int, device: str, bench: Workbench):
        self.size, self.device = size, device
        self._threads = torch.get_num_threads()
        local = bench.launch is None
        host = "127.0.0.1" if local else bench.launch.host
        if local and (problem := missing_gpus(device, size)):
            raise UserError(problem)
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        shared = device == "cpu" and local  # on a cluster each has cores of its own
        threads = max(1, self._threads // size) if shared else self._threads
        address = Address(host, store.port, size, device, threads)
        self._members: Members = LocalMembers(address) if local else bench.launch(address)
        torch.set_num_threads(threads)
        self.over = False
        with self._watched():
            self._await(store)
            self.member, self._orders = joined(address, 0, 0, bench, store)
        if device == "cuda":  # a collective of NCCL waits for one that is gone
            threading.Thread(target=self._break_off, daemon=True).start()

    @contextmanager
    def together(self, work: str, **about: Any) -> Iterator[None]:
        """Has the others do a work of `Member`, while the block does this process's part of it.

        Raises:
            MemberLostError: one of them is gone. After this or any other error the group has ended.
        """
        with self._watched():
            tell(self._orders, (work, about))
            yield

    def do(self, work: str, **about: Any) -> Any:
        """Has all do a work of `Member`, and gives this process's result."""
        with self.together(work, **about):
            return getattr(self.member, work)(**about)

    def end(self) -> None:
        """Ends the other processes."""
        if self.over:
            return
        self.over = True
        with suppress(Exception):
            tell(self._orders, None)
        self._gone()

    def _await(self, store: dist.TCPStore) -> None:
        """Returns when all others have come."""
        while not store.check([f"here/{rank}" for rank in range(1, self.size)]):
            if self._members.lost.wait(0.1):
                raise self._lost()

    def _lost(self) -> MemberLostError:
        error = MemberLostError(self._members.how)
        if "OutOfMemoryError" in self._members.how:
            error.failure_class = "out_of_memory"
        return error

    def _break_off(self) -> None:
        self._members.lost.wait()
        if not self.over:
            dist.distributed_c10d._abort_process_group()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.over = True
            lost = self._is_lost(error)
            self._gone()
            if lost:
                raise self._lost() from error
            raise

    def _is_lost(self, error: BaseException) -> bool:
        """Whether an error came of another's end, and not the other way round."""
        if not isinstance(error, RuntimeError) or isinstance(error, UserError) or hasattr(error, "failure_class"):
            return False
        return bool(_CUT_OFF.search(f"{error}")) and self._members.lost.wait(_NOTICED)

    def _gone(self) -> None:
        self.member = None
        with suppress(Exception):
            dist.destroy_process_group()
        self._members.end(_ENDING)
        torch.set_num_threads(self._threads)


def group_of(bench: Workbench, cell: CellConfig) -> Group:
    """The group that runs a cell: the one of the cell before, where it has the size, or a new one."""
    device = resolve_device(cell.device).type
    found = bench.group
    if found is not None and (found.over or (found.size, found.device) != (cell.gpus_per_cell, device)):
        found.end()
        bench.group = found = None
    if found is None:
        bench.group = found = Group(cell.gpus_per_cell, device, bench)
    return found


@contextmanager
def lent_by_group(cell: CellConfig, bench: Workbench, begun: Start, file: MaskFile | None) -> Iterator[GroupModel]:
    """The model that a cell begins with, in a group, under its masks."""
    group = group_of(bench, cell)
    start = str(Path(begun.checkpoint.folder).resolve())
    group.do("open", cell=cell, start=start, file=file, smaller=begun.smaller)
    yield GroupModel(group)
