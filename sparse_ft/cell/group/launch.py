"""The members of a group beside the one that leads, started by torch's own elastic launcher on this machine."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = ["Address", "Launch", "LocalMembers", "Members"]


@dataclass(frozen=True)
class Address:
    """Where a group meets.

    Attributes:
        host, port: of the leader's store.
        size: processes of the group.
        device: cpu or cuda.
        threads: of each process.
    """

    host: str
    port: int
    size: int
    device: str
    threads: int


class Members(Protocol):
    """Processes that follow a leader.

    Attributes:
        lost: set when one of them has ended; ``how`` then says how, in a few words.
    """

    lost: threading.Event
    how: str

    def end(self, seconds: float) -> None:
        """Waits so long for them to end by themselves, and ends the others."""


class Launch(Protocol):
    """Starts the processes of a group.

    Attributes:
        host: by which they reach this one.
    """

    host: str

    def __call__(self, address: Address) -> Members:
        """Starts all but the leader."""


@dataclass
class LocalMembers:
    """Processes of torch's elastic agent, which runs in a thread here; each ends with this process.

    Args:
        address: where they meet.

    Attributes:
        folder: what they print.
    """

    address: Address
    how: str = ""
    lost: threading.Event = field(default_factory=threading.Event)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sparse_ft_group_")))

    def __post_init__(self) -> None:
        self._failed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            for file in self.folder.glob("*.pid"):
                with suppress(OSError, ValueError):
                    os.kill(int(file.read_text()), signal.SIGKILL)
            self._thread.join(seconds)
        if not self._failed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        for name in ("agent", "multiprocessing", "rendezvous"):  # what they say is said of the cell
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        at = self.address
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=at.size - 1,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"group-{at.port}",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(self.folder), redirects=Std.ALL),
        )
        told = (at.host, at.port, at.size, at.device, at.threads, os.getpid(), self.folder)
        try:
            elastic_launch(config, sys.executable)("-m", "sparse_ft.cell.group.follow", *map(str, told))
            self.how = "a process of the group has ended"
        except ChildFailedError as error:
            self._failed = True
            rank, failure = error.get_first_failure()
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            how += self._last_error()
            self.how = f"process {rank + 2} of the group's {at.size} is gone ({how}), see {self.folder}"
        except Exception as error:
            self.how = f"the group's processes could not be started: {error}"
        self.lost.set()

    def _last_error(self) -> str:
        """What the processes' output says last of an error."""
        said = "\n".join(file.read_text(errors="replace") for file in self.folder.rglob("stderr.log"))
        errors = re.findall(r"^(?:\[rank\d+\]: ?)?([\w.]+(?:Error|Exception)\b.*)", said, re.MULTILINE)
        return f", {errors[-1]}" if errors else ""
