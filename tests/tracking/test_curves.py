"""Curves as runs, out of the way of the cells."""

from sparse_ft.tracking.curves import write_curve_runs
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker

CURVE = {
    **{"key": "a|b", "name": "s2s magnitude", "colour": "#123456", "mode": "sparse_to_sparse", "steps": "percent"},
    "points": {"eval/accuracy": [(50, 0.5), (70, 0.25)]},
}


def test_curves_have_an_experiment_of_their_own_and_are_written_once():
    tracker = Tracker(experiment="mine")
    parent = tracker.start("study", {Tag.KIND: Kind.STUDY})
    old = tracker.start_child(parent, "as version 0.2 wrote it", {Tag.KIND: Kind.CURVE, Tag.CURVE_KEY: "a|b"})
    other = tracker.start_child(tracker.start("another"), "of another study", {Tag.KIND: Kind.CURVE})
    for _ in range(2):
        write_curve_runs(tracker, parent, [CURVE])
        assert {run.run_id for run in tracker.search(f"tags.kind = '{Kind.CURVE}'")} == {other} != {old}
        (run,) = Tracker(experiment="mine curves").search()
    assert run.parent_run_id == parent and run.params == {"cfg/mode": "sparse_to_sparse"}
    assert run.tags[Tag.STEPS] == "percent" and tracker.curve(run.run_id, "eval/accuracy") == [(50, 0.5), (70, 0.25)]
    finer = CURVE | {"steps": "tenths of a percent", "points": {"eval/accuracy": [(500, 0.5), (625, 0.25)]}}
    write_curve_runs(tracker, parent, [finer])
    (again,) = Tracker(experiment="mine curves").search()
    assert again.run_id != run.run_id and tracker.curve(again.run_id, "eval/accuracy") == [(500, 0.5), (625, 0.25)]
    assert "Step" in tracker.client.get_experiment(again.experiment_id).tags[Tag.NOTE]
    write_curve_runs(tracker, None, [CURVE])
    assert len(Tracker(experiment="mine curves").search()) == 2
