"""``python -m entrypoints.measure``, the entry point ``measure`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("measure", sys.argv[1:], "python -m entrypoints.measure"))
