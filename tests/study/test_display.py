import io
from pathlib import Path

from rich.console import Console

from sparse_ft.cell.failures import Failure
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.study.display import Display, LiveDisplay
from sparse_ft.study.jobs import CellJob, MaskJob, Outcome


def _job(**values):
    return CellJob(CellConfig(model="tiny-llama", mode="dense", **values), None, Path(), key="key")


def _done(job, accuracy, seconds=10.0, level=0.0):
    metrics = {"eval/accuracy": accuracy, "train/tokens_per_second": 1234.0, "sparsity/target": level}
    return Outcome(job, "run", "FINISHED", seconds, metrics)


def _bad(job):
    return Outcome(job, "run", "FAILED", 5.0, failure=Failure("out_of_memory", "too big", ""))


def test_a_line_a_cell_with_what_came_out_and_what_is_left():
    stream = io.StringIO()
    display = Display(4, workers=2, stream=stream)
    first = _job()
    display.started(0, first)
    display.ended(0, _done(first, 0.75))
    display.ended(1, _bad(first), False)  # tried again
    display.ended(1, _bad(first))
    display.ended(0, Outcome(MaskJob(MaskConfig(), "set", Path(), "k"), "run", "FINISHED", 1.0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "[1/4] FINISHED dense · boolq · tiny-llama: accuracy 0.750, 1,234 tokens/s, 10.0 s; 15.0 s left"
    )
    assert "out_of_memory: too big" in lines[1]
    assert "tried again" in lines[1]
    assert lines[2].startswith("[2/4] FAILED")
    assert "1 failed" in lines[2]
    assert lines[3].startswith("[masks] FINISHED masks set")
    assert (display.finished, display.failed) == (1, 1)
    assert display.seconds_left == 10.0  # two cells of 10 s for two workers


def test_the_live_display_shows_counts_stages_and_the_best_so_far():
    stream = io.StringIO()
    display = LiveDisplay(3, console=Console(file=stream, force_terminal=True, width=140, color_system=None))
    job = _job(seed=1)
    with display:
        display.ended(0, _done(_job(), 0.5, level=0.7))
        display.ended(0, _done(_job(), 0.6, level=0.7))
        display.started(0, job)
        display.stage(0, "train", 12, "steps")
        display.advanced(0, 3, "loss 1.5")
        console = Console(file=io.StringIO(), width=140)
        console.print(display._draw())
    shown = console.file.getvalue()
    for part in ("2 done", "0 failed", "1 running", "0 left", "train", "3/12 steps", "loss 1.5", "1,234 tokens/s"):
        assert part in shown
    assert "0.600" in shown
    _, bar, stage, *_ = shown.splitlines()
    assert set(bar.strip()) == {"━"}
    assert stage.startswith("dense · boolq · tiny-llama")
    assert "0.500" not in shown
    assert "70" in shown


def test_a_long_stage_says_where_it_is_where_nothing_is_redrawn(monkeypatch):
    stream = io.StringIO()
    display = Display(1, stream=stream)
    clock = [100.0]
    monkeypatch.setattr("sparse_ft.study.display.time.monotonic", lambda: clock[0])
    display.started(0, _job())
    display.stage(0, "train", 100, "steps")
    for _ in range(100):
        clock[0] += 2.0
        display.advanced(0, 1, "loss 1.5")
    display.stage(0, "score", 10, "")
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    title = "dense · boolq · tiny-llama: train"
    assert lines == [
        f"{title}: 30/100 steps after 60.0 s, about 2 min left, loss 1.5",
        f"{title}: 60/100 steps after 2 min, about 80.0 s left, loss 1.5",
        f"{title}: 90/100 steps after 3 min, about 20.0 s left, loss 1.5",
        f"{title} took 3 min, loss 1.5",
    ]
