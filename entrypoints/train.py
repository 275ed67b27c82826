"""``python -m entrypoints.train``, the entry point ``train`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:], "python -m entrypoints.train"))
