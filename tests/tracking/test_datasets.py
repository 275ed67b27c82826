"""Data sets in the store: each is there once, whoever logs it first."""

from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from sparse_ft.tracking.record import DataInput
from sparse_ft.tracking.runs import Tracker

pytestmark = pytest.mark.usefixtures("made_store")


def test_two_runs_log_a_data_set_that_is_new_to_both(tmp_path: Path):
    """The other worker's comes in after this one has looked, and before it writes."""
    tracker, other = Tracker(), Tracker()
    first, second = tracker.start("cell"), other.start("cell")
    questions = [DataInput("boolq/validation", "a" * 16, ("evaluation",), {"file": "/rows"})]

    waiting = [second]

    def write(*_args):
        while waiting:
            other.log_inputs(waiting.pop(), questions)

    event.listen(Session, "before_flush", write)
    try:
        tracker.log_inputs(first, questions)
    finally:
        event.remove(Session, "before_flush", write)
    assert not waiting
    for run in (first, second):
        (found,) = tracker.client.get_run(run).inputs.dataset_inputs
        assert found.dataset.name == "boolq/validation" and found.tags[0].value == "evaluation"
