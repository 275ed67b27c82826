"""What MLflow measures of the machine goes to the run of whoever does the work."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_ft.tracking import system_metrics
from sparse_ft.tracking.runs import Tracker


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study")


def test_a_short_block_has_no_system_metrics(tracker: Tracker):
    run_id = tracker.start("short")
    threads = threading.active_count()
    with tracker.system_metrics(run_id, after=60):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads and tracker.run(run_id).metrics == {}


def test_a_store_that_is_away_holds_nothing_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system_metrics, "_ENDING_SECONDS", 0.5)
    began = time.monotonic()
    with system_metrics.system_metrics("http://127.0.0.1:9", "0" * 32):
        time.sleep(0.2)  # the monitor asks for the run
    assert time.monotonic() - began < 30  # mlflow itself tries for minutes


def test_gpus_are_among_the_system_metrics(tracker: Tracker, monkeypatch: pytest.MonkeyPatch):
    import pynvml  # which the requirements name: without it no GPU is looked at

    used = SimpleNamespace(used=3e9, total=4e9)
    found = {"Init": None, "DeviceGetCount": 1, "DeviceGetHandleByIndex": "gpu", "DeviceGetMemoryInfo": used}
    found |= {"DeviceGetUtilizationRates": SimpleNamespace(gpu=7)}
    found |= {"DeviceGetPowerUsage": 9, "DeviceGetEnforcedPowerLimit": 9}
    for name, value in found.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, value=value: value)
    run_id = tracker.start("measured")
    with tracker.system_metrics(run_id, seconds=0.1):
        for _ in range(100):
            if "system/gpu_0_memory_usage_percentage" in tracker.run(run_id).metrics:
                break
            time.sleep(0.1)
    assert tracker.run(run_id).metrics["system/gpu_0_memory_usage_percentage"] == 75


@pytest.mark.slow
def test_system_metrics_of_this_machine(tracker: Tracker):
    run_id = tracker.start("measured")
    with tracker.system_metrics(run_id, seconds=0.2):
        time.sleep(2)
    names = tracker.run(run_id).metrics
    assert "system/cpu_utilization_percentage" in names and tracker.run(run_id).status == "RUNNING"
