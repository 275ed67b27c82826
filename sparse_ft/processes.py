"""Names of processes: no other machine, container or start of a driver has the same."""

from __future__ import annotations

import hashlib
import os
import platform
import uuid
from pathlib import Path

import psutil

__all__ = ["driver_name", "is_alive", "is_here", "process_name"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def process_name() -> str:
    """This process, so that another one can tell whether it still lives: host, process id, its start, its place."""
    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.2f} {_place()}"


def driver_name() -> str:
    """This start of a driver: its process, and a token that no second start has."""
    return f"{process_name()} {uuid.uuid4().hex[:8]}"


def is_here(name: str) -> bool:
    """Whether a process's number means something on this machine. A host's name says little: containers and nodes
    that were started anew share it."""
    return name.split(" ")[3:4] == [_place()]


def is_alive(name: str) -> bool:
    """Whether a process of this place lives."""
    try:
        _, number, began = name.split(" ")[:3]
        process = psutil.Process(int(number))
        same = abs(process.create_time() - float(began)) < 1  # the number may have been given to another since
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.Error):
        return False


def _place() -> str:
    """This boot of this machine, and the container in it (12 hex digits)."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else f"{uuid.getnode()} {psutil.boot_time():.0f}"
    try:
        numbers = os.readlink("/proc/self/ns/pid")  # process ids mean the same only within one namespace
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {boot} {numbers}".encode()).hexdigest()[:12]
