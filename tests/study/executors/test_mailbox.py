"""Objects through a file that grows."""

import os
import resource
import signal

import pytest

from sparse_ft.study.executors.mailbox import Mailbox


def test_what_is_put_is_taken_once_and_in_order(tmp_path):
    ours = Mailbox(tmp_path / "new" / "box").create()
    theirs = Mailbox(tmp_path / "new" / "box")
    assert list(theirs.take()) == []
    ours.put([("stage", "train", 5), None])
    assert list(theirs.take()) == [("stage", "train", 5), None]
    ours.put([{"loss": 1.5}])
    ours.put([b"x" * 100_000])
    taken = theirs.take()
    assert next(taken) == {"loss": 1.5}
    taken.close()  # whoever has enough leaves the rest for the next look
    assert list(theirs.take()) == [b"x" * 100_000] and list(theirs.take()) == []


def test_what_has_come_in_part_is_taken_when_it_is_whole(tmp_path):
    Mailbox(tmp_path / "whole").create().put(["first", "second"])
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(len(whole) + 1):
        (tmp_path / "part").write_bytes(whole[:cut])
        box = Mailbox(tmp_path / "part")
        before = list(box.take())
        with open(tmp_path / "part", "ab") as file:
            file.write(whole[cut:])
        assert before + list(box.take()) == ["first", "second"]


def test_what_does_not_fit_leaves_nothing_behind(tmp_path):
    box, path = Mailbox(tmp_path / "box").create(), tmp_path / "box"
    box.put(["small"])
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            box.put(["x" * 1000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert os.stat(path).st_size == size
    box.put(["again"])
    assert list(Mailbox(path).take()) == ["small", "again"]
