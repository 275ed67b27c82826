"""Fails unless the newest study in the tracking store has cells and all of its child runs are FINISHED."""

import sys

from sparse_ft.tracking.runs import Tracker

tracker = Tracker()
(study,) = [run for run in tracker.search() if run.tags.get("kind") == "study"]
children = tracker.children(study.run_id)
cells = [run for run in children if run.tags.get("kind") == "cell"]
unfinished = [run.name for run in [study, *children] if run.status != "FINISHED"]
print(f"{len(cells)} cells, {len(children)} child runs, not FINISHED: {unfinished or 'none'}")
sys.exit(0 if cells and not unfinished else 1)
