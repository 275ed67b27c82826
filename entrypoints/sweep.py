"""``python -m entrypoints.sweep``, the entry point ``sweep`` of the MLflow project."""

from entrypoints._command import command
from sparse_ft.settings.commands import SweepConfig


def work(config: SweepConfig) -> int:
    # Imported here, so that --help and a mistyped flag are answered at once.
    from sparse_ft.study.driver import sweep

    return sweep(config)


if __name__ == "__main__":
    command("sweep", SweepConfig, work)
