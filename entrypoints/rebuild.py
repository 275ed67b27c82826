"""``python -m entrypoints.rebuild``, the entry point ``rebuild`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("rebuild", sys.argv[1:], "python -m entrypoints.rebuild"))
