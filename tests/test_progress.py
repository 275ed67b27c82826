import io

from sparse_ft.progress import SILENT, BarProgress, LineProgress


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
