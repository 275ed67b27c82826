import io
import re

from sparse_ft.progress import SILENT, BarProgress, LineProgress, duration, standing


def test_lines_tell_start_end_amount_and_note():
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.say("cell 1")
    progress.start("train", 3, "steps")
    progress.advance(2, note="loss 1.5")
    progress.advance()
    progress.start("read", 2e9, "B")
    progress.advance(1e9)
    progress.stop()
    progress.stop()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["cell 1", "train ..."]
    assert lines[2].startswith("train: 3/3 steps in ")
    assert lines[2].endswith(", loss 1.5")
    assert lines[4].startswith("read: 1.00/2.00 GB in ")
    assert len(lines) == 5


def test_a_long_stage_says_now_and_then_where_it_is_and_what_is_left():
    stream = io.StringIO()
    progress = LineProgress(stream, every=0)
    progress.start("prune blocks", 64, "samples")
    progress.advance(16, note="block 8 of 32")
    progress.advance(48)
    progress.stop()
    _, halfway, end = stream.getvalue().splitlines()
    assert re.fullmatch(r"prune blocks: 16/64 samples after 0\.\d s, about 0\.\d s left, block 8 of 32", halfway)
    assert end.startswith("prune blocks: 64/64 samples in ")
    assert standing(16, 64, "samples", 40.0) == "16/64 samples after 40.0 s, about 2 min left"
    assert standing(5, 0, "", 40.0) == "5/0 after 40.0 s"  # nobody knows how many there will be

    quiet = io.StringIO()
    progress = LineProgress(quiet)
    progress.start("read", 100)
    for _ in range(99):
        progress.advance()
    assert quiet.getvalue() == "read ...\n"  # nothing is said twice within half a minute


def test_times_for_people():
    assert [duration(s) for s in (4.06, 150, 11_100)] == ["4.1 s", "2 min", "3 h 5 min"]


def test_bars_show_stage_amount_and_time_left(capsys):
    progress = BarProgress()
    progress.start("train", 4, "steps")
    progress.advance(3, note="loss 2.0")
    progress.stop()
    shown = capsys.readouterr().err
    assert "train" in shown
    assert "3/4 steps" in shown
    assert "/s" in shown


def test_bars_show_bytes_and_their_rate(capsys):
    progress = BarProgress()
    progress.start("read", 4e9, "B")
    progress.advance(3e9)
    progress.stop()
    shown = capsys.readouterr().err
    assert "3.00/4.00 GB" in shown
    assert "GB/s" in shown


def test_silence_is_silent(capsys):
    SILENT.start("x", 1)
    SILENT.advance()
    SILENT.say("y")
    SILENT.stop()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
