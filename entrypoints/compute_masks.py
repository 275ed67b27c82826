"""``python -m entrypoints.compute_masks``, the entry point ``compute_masks`` of the MLflow project."""

from entrypoints._command import command
from sparse_ft.settings.commands import MaskConfig


def work(config: MaskConfig) -> int:
    # Imported here, so that --help and a mistyped flag are answered at once.
    from sparse_ft.commands import compute_masks

    return compute_masks(config)


if __name__ == "__main__":
    command("compute_masks", MaskConfig, work)
