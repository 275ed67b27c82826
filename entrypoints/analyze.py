"""``python -m entrypoints.analyze``, the entry point ``analyze`` of the MLflow project."""

from entrypoints._command import command
from sparse_ft.settings.commands import AnalyzeConfig


def work(config: AnalyzeConfig) -> int:
    # Imported here, so that --help and a mistyped flag are answered at once.
    from sparse_ft.commands import analyze

    return analyze(config)


if __name__ == "__main__":
    command("analyze", AnalyzeConfig, work)
