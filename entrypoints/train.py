"""``python -m entrypoints.train``, the entry point ``train`` of the MLflow project."""

from entrypoints._command import command
from sparse_ft.settings.cell import CellConfig


def work(config: CellConfig) -> int:
    # Imported here, so that --help and a mistyped flag are answered at once.
    from sparse_ft.commands import train

    return train(config)


if __name__ == "__main__":
    command("train", CellConfig, work)
