"""``python -m entrypoints.sweep``, the entry point ``sweep`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("sweep", sys.argv[1:], "python -m entrypoints.sweep"))
