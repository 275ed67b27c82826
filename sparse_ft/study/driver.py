"""The study: mask sets, then cells, as child runs under one parent; models kept, a table and a report at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sparse_ft.files import write_text
from sparse_ft.levels import level_label
from sparse_ft.models.devices import resolve_device
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.display import Display
from sparse_ft.study.perplexity import with_perplexity
from sparse_ft.study.plan import make_plan
from sparse_ft.study.queue import RunningExecutor
from sparse_ft.study.session import Session
from sparse_ft.study.study_file import load_study
from sparse_ft.tracking.curves import write_curve_runs
from sparse_ft.tracking.tables import SUMMARY, log_table

__all__ = ["sweep"]

_SHOWN = 40  # a table of more cells is for a file, not for a terminal


def sweep(config: SweepConfig) -> int:
    """Runs a study to its end, or resumes one. Returns 0 when every cell is FINISHED, else 1.

    Raises:
        UserError: it cannot start, see `sparse_ft.study.session.Session.run`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after workers were stopped and runs closed.
    """
    study = load_study(config.config, gpu=lambda device: resolve_device(device).type == "cuda")
    if config.trainer is not None:
        study = replace(study, trainer=config.trainer)
    if study.search is None:
        study = with_perplexity(study, config, make_plan)
        return Grid(config, make_plan(study)).run()
    from sparse_ft.study.search.session import Search, search_plan

    return Search(config, with_perplexity(study, config, search_plan)).run()


class Grid(Session):
    """Every cell of a plan, and the Pareto front of their models."""

    def described(self) -> Iterator[str]:
        plan = self.plan
        yield f"study {plan.study.name}: {len(plan.cells)} cells, {len(plan.mask_sets)} mask sets"
        if same := len(plan.cells) - len(plan.computed):
            yield f"  {same} cells at 0 % compute the same as another and are recorded, not run"
        for item in plan.mask_sets:
            yield f"  masks {item.name}: {', '.join(level_label(level) for level in item.config.levels)} %"
        for number, cell in enumerate(plan.cells, 1):
            same_as = "" if cell.same_as is None else f"  (same as {cell.same_as + 1})"
            yield f"  {number:4d}  {cell.title}{same_as}"

    def drive(self, executor: RunningExecutor, display: Display) -> None:
        self.phases.run_cells(executor, display)

    def finish(self) -> None:
        # Late: a dry run draws nothing and rebuilds no model.
        from sparse_ft.analysis.note import study_note
        from sparse_ft.analysis.terminal import print_tables, scores_tables, table_text, terminal_table
        from sparse_ft.analysis.write import write_analysis
        from sparse_ft.study.keep import keep_models

        study, tracker, parent, progress = self.plan.study, self.tracker, self.start.parent, self.bench.progress
        folder = self.start.folder
        if study.kept in ("pareto", "all"):
            keep_models(
                tracker, parent, folder, study.registers, self.bench, study.kept == "pareto", progress,
                lambda text: self._print(text, style="red"), study.kept_format == "packed",
            )  # fmt: skip
        expected = [config.canonical() for config in self.plan.configs]
        runs = tracker.children(parent)
        report = write_analysis(
            runs, folder / "report", title=study.name, progress=progress, expected=expected,
            figures=study.figures != "none",
        )  # fmt: skip
        write_text(folder / "report" / "table.txt", table_text(terminal_table(runs), *scores_tables(runs)))
        tracker.log_folder(parent, folder / "report", "report")
        log_table(tracker, parent, report.cells, SUMMARY)
        write_curve_runs(tracker, parent, report.curves)
        tracker.note(parent, study_note(report.sentences, report.cells, report.figures, self.command))
        for figure in report.figures.values():
            self._print(f"figure: {figure}")
        self._print(f"tables: {folder / 'report'}")
        if self.total <= _SHOWN:
            print_tables(self.console, runs)
            for signal in report.signals:
                self._print(str(signal))
            self.answer = report.answer
