"""``analyze``: tables, figures and a report page from the runs of a study or an experiment."""

from __future__ import annotations

from pathlib import Path

from sparse_ft.analysis.note import study_note
from sparse_ft.analysis.terminal import print_tables
from sparse_ft.analysis.write import write_analysis
from sparse_ft.errors import UserError
from sparse_ft.progress import shown_progress, wide_console
from sparse_ft.settings.command_line import command_line
from sparse_ft.settings.commands import AnalyzeConfig
from sparse_ft.settings.field import plain_values
from sparse_ft.tracking.curves import write_curve_runs
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Kind, Tag
from sparse_ft.tracking.runs import Tracker
from sparse_ft.tracking.tables import SUMMARY, log_table

__all__ = ["analyze"]


def analyze(config: AnalyzeConfig) -> int:
    """Writes tables, figures and curve runs for a study or an experiment, as a run of its own. Returns 0."""
    if config.parent_run_id is None and config.experiment is None:
        raise UserError("Nothing to analyze: give parent_run_id (a study's run) or experiment (a name).")
    if config.parent_run_id is not None:
        tracker = Tracker.reading(run_id=config.parent_run_id)
        parent, found = config.parent_run_id, tracker.run(config.parent_run_id)
        if found.kind != Kind.STUDY:
            raise UserError(f"The run {parent} ({found.name}) is no study; give a study's run, or an experiment.")
        title, runs = found.name, tracker.children(parent)
    else:
        tracker = Tracker.reading(config.experiment)
        parent, title = None, config.experiment
        runs = tracker.search(experiment_id=tracker.experiment(config.experiment))
    run_id = tracker.start(f"analysis {title}", {Tag.KIND: Kind.ANALYSIS, Tag.COMMAND: command_line("analyze", config)})
    with tracker.ending(run_id):
        tracker.log(run_id, params=flatten_config(plain_values(config)))
        folder = Path(config.output_dir)
        result = write_analysis(runs, folder, config.baseline, title, progress=shown_progress())
        tracker.log_folder(run_id, folder, "report")
        write_curve_runs(tracker, parent, result.curves)
        for told in filter(None, (run_id, parent)):
            command = tracker.run(told).tags.get(Tag.COMMAND)
            log_table(tracker, told, result.cells, SUMMARY)
            tracker.note(told, study_note(result.sentences, result.cells, result.figures, command))
    console = wide_console()
    print_tables(console, runs)
    for path in result.files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return 0
