"""What it costs that a cell's curves reach their run while it trains.

    python benchmarks/live.py [--rounds 5] [--steps 100]

The same tiny cell with its points sent and without, in turns, in one process and on a sqlite store: seconds of the
clock and of processor time (all threads), and their ratio, medians over the rounds. Then what sending takes by itself,
in processor time: to take the four points of a step, and to send what ten seconds of a training gather at so many steps
a second. Goals: under 0.1 s of a tiny cell, under 0.5 % of a real one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from sparse_ft.cell.live import live, named
from sparse_ft.cell.run import run_cell
from sparse_ft.cell.workbench import Workbench
from sparse_ft.settings.cell import CellConfig
from sparse_ft.tracking.live import EVERY_SECONDS, LivePoints
from sparse_ft.tracking.runs import Tracker

STEP = {"loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 1000.0}
RATES = (0.3, 1, 3, 10)  # steps a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of every measurement; medians are printed")
    parser.add_argument("--steps", type=int, default=100, help="of the tiny cell")
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as scratch:
        tracker = Tracker(f"sqlite:///{scratch}/mlflow.db", "live")
        cells(tracker, Path(scratch), args.rounds, args.steps)
        print()
        parts(tracker, Path(scratch), args.rounds)


def cells(tracker: Tracker, scratch: Path, rounds: int, steps: int) -> None:
    """Prints a whole tiny cell with and without its points sent."""
    cell = CellConfig(model="tiny-llama", mode="dense", data_dir="made", max_steps=steps, eval_limit=8, lora_r=2)
    bench = Workbench()

    def run(sent: bool, run_id: str) -> None:
        with live(tracker, run_id, bench, scratch) if sent else nullcontext():
            run_cell(cell, None, bench, scratch / "cell")

    run(True, tracker.start("cell"))  # loads what is loaded once
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(rounds):
        for sent in (True, False) if number % 2 else (False, True):
            found[sent].append(seconds(partial(run, sent, tracker.start("cell"))))
    print(f"{'tiny cell, ' + str(steps) + ' steps':28} {'not sent':>9} {'sent':>9} {'ratio':>7} {'more, s':>8}")
    for position, clock in enumerate(("seconds", "processor seconds")):
        without, sent = ([times[position] for times in found[kind]] for kind in (False, True))
        ratio = statistics.median(b / a for a, b in zip(without, sent, strict=True))
        more = statistics.median(b - a for a, b in zip(without, sent, strict=True))
        print(f"{clock:28} {statistics.median(without):9.3f} {statistics.median(sent):9.3f} {ratio:7.3f} {more:8.3f}")


def parts(tracker: Tracker, scratch: Path, rounds: int) -> None:
    """Prints what the points of ten seconds take, as a share of these."""
    print(f"{'steps a second':>14} {'points':>7} {'take, ms':>9} {'send, ms':>9} {'of 10 s':>8}")
    for rate in RATES:
        steps, taken, sent = max(1, round(rate * EVERY_SECONDS)), [], []
        for _ in range(rounds):
            points = LivePoints(tracker, tracker.start("parts"), scratch / "unsent")
            points._thread = points  # nothing is sent but by the call below
            taken.append(seconds(partial(take, points, steps))[1])
            sent.append(seconds(points._send)[1])
        both = statistics.median(taken), statistics.median(sent)
        share = sum(both) / EVERY_SECONDS
        print(f"{rate:14g} {4 * steps:7} {1000 * both[0]:9.2f} {1000 * both[1]:9.1f} {share:8.2%}")


def take(points: LivePoints, steps: int) -> None:
    """Hands over the points of so many steps."""
    for step in range(steps):
        points.add(step, named("train", STEP))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


if __name__ == "__main__":
    main()
