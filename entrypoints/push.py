"""``python -m entrypoints.push``, the entry point ``push`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("push", sys.argv[1:], "python -m entrypoints.push"))
