"""Memory that runs out in earnest: the address space of a process is limited until a batch no longer fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparse_ft.tracking.runs import Tracker

ROOT = Path(__file__).resolve().parents[2]

# A process of its own, because a limit on the address space cannot be lifted again.
STUDY = """
import json, resource, sys
from pathlib import Path
from sparse_ft.settings.cell import CellConfig
from sparse_ft.study.executors.serial import SerialExecutor
from sparse_ft.study.jobs import CellJob
from sparse_ft.study.queue import Listener, Queue
from sparse_ft.study.worker import WorkerSetup
from sparse_ft.tracking.runs import Tracker

folder, small = Path(sys.argv[1]), json.loads(sys.argv[2])

def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

tracker = Tracker()
parent = tracker.start("study", {"kind": "study"})
executor = SerialExecutor(WorkerSetup(tracker.uri, parent, folder / "untuned"), Listener())

def run(name, **values):
    cell = CellConfig(**{"model": "tiny-llama", "mode": "dense", **small, **values})
    queue = Queue([CellJob(cell, None, folder / name, key=name)], max_retries=0)
    executor.run(queue)
    return queue.outcomes[-1]

run("warm", batch_size=2)
before = memory("VmSize")
free = run("free")
needed = memory("VmPeak") - before
# What a run needs varies with what the allocator still holds: tightened until the whole batch just fails to fit.
for percent in range(90, 40, -10):
    limit = before + percent * needed // 100
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    tight = run(f"tight{percent}")
    if tight.job.attempt > 1:
        break
print("REPORT", json.dumps({"parent": parent, "free": free.run_id, "tight": tight.run_id, "needed": needed}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space are Linux's")
def test_a_batch_that_does_not_fit_is_halved_once_and_the_step_stays_the_same(small, tmp_path):
    values = small | {"max_steps": 1, "batch_size": 256, "max_seq_len": 256, "perplexity_tokens": 0}
    done = subprocess.run(
        [sys.executable, "-c", STUDY, str(tmp_path), json.dumps(values)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Tensors are mapped, and unmapped when freed: otherwise the heap's holes decide what fits.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    report = json.loads(line.removeprefix("REPORT"))
    tracker = Tracker()
    tight = [run for run in tracker.children(report["parent"]) if run.start_time][-2:]
    failed, again = tight
    assert (failed.status, again.status) == ("FAILED", "FINISHED")
    assert failed.tags["failure_class"] == "out_of_memory"
    assert "allocate" in tracker.fetch_text(failed.run_id, "traceback.txt")
    assert again.run_id == report["tight"]
    assert again.tags["cell_key"] == failed.tags["cell_key"]
    assert (again.tags["reduced_batch"], again.tags["attempt"]) == ("256 -> 128", "2")
    ran = yaml.safe_load(tracker.fetch_text(again.run_id, "config.yaml"))
    assert (ran["batch_size"], ran["gradient_accumulation"]) == (128, 2)
    # Results are compared by the parameters: there it is the planned cell.
    assert (again.params["cfg/batch_size"], again.params["cfg/gradient_accumulation"]) == ("256", "1")
    # Half the batch twice is the same optimizer step: the loss is that of the run that had the memory.
    free = tracker.run(report["free"])
    assert again.metrics["train/loss"] == pytest.approx(free.metrics["train/loss"], rel=1e-5)
    assert again.metrics["eval/loss"] == pytest.approx(free.metrics["eval/loss"], rel=1e-4)
