"""``python -m entrypoints.pack``, the entry point ``pack`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("pack", sys.argv[1:], "python -m entrypoints.pack"))
