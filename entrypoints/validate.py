"""``python -m entrypoints.validate``, the entry point ``validate`` of the MLflow project."""

from entrypoints._command import command
from sparse_ft.settings.commands import ValidateConfig


def work(config: ValidateConfig) -> int:
    # Imported here, so that --help and a mistyped flag are answered at once.
    from sparse_ft.commands import validate

    return validate(config)


if __name__ == "__main__":
    command("validate", ValidateConfig, work)
