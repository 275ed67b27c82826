"""``python -m entrypoints.validate``, the entry point ``validate`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("validate", sys.argv[1:], "python -m entrypoints.validate"))
