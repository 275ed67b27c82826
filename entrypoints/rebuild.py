"""``python -m entrypoints.rebuild``, the entry point ``rebuild`` of the MLflow project."""

from entrypoints._command import command
from sparse_ft.settings.commands import RebuildConfig


def work(config: RebuildConfig) -> int:
    # Imported here, so that --help and a mistyped flag are answered at once.
    from sparse_ft.commands import rebuild

    return rebuild(config)


if __name__ == "__main__":
    command("rebuild", RebuildConfig, work)
