"""Who works at a study: a process named so that no other machine, container or start can be taken for it."""

from __future__ import annotations

import hashlib
import os
import platform
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from sparse_ft.tracking.runs import Tracker

__all__ = ["HEARTBEAT_SECONDS", "driver_name", "is_alive", "is_here", "living_driver", "process_name"]

HEARTBEAT_SECONDS = 30  # how often a driver says on its run that it lives
_MISSED_BEATS = 3  # so many intervals without a heartbeat, and a driver counts as dead
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


def living_driver(tracker: Tracker, run: dict[str, Any]) -> str | None:
    """Who drives a study now, in words; None: nobody.

    Of another place only the heartbeat tells. One that seems to have stopped is watched for more than an interval
    before it is believed: the clocks of two machines may differ.
    """
    if run["status"] != "RUNNING":
        return None
    name, beat = run["tags"].get("driver", ""), _beat(run)
    since = datetime.fromtimestamp(run["start_time"]).strftime("%Y-%m-%d %H:%M:%S")
    host, number = (name.split(" ") + ["?", "?"])[:2]
    words = f"process {number} on {host}, since {since}"
    if is_here(name):
        return words if is_alive(name) else None
    if abs(time.time() - beat) < _MISSED_BEATS * HEARTBEAT_SECONDS:
        return words
    give_up = time.monotonic() + (1.5 * HEARTBEAT_SECONDS if beat else 0)
    while time.monotonic() < give_up:
        time.sleep(HEARTBEAT_SECONDS / 10)
        if _beat(tracker.run(run["run_id"])) != beat:
            return words
    return None


def _beat(run: dict[str, Any]) -> float:
    try:
        return float(run["tags"].get("heartbeat", 0))
    except ValueError:
        return 0.0


def _place() -> str:
    """This boot of this machine, and the container in it (12 hex digits)."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else f"{uuid.getnode()} {psutil.boot_time():.0f}"
    try:
        numbers = os.readlink("/proc/self/ns/pid")  # process ids mean the same only within one namespace
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {boot} {numbers}".encode()).hexdigest()[:12]
