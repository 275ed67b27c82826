"""``python -m entrypoints.compute_masks``, the entry point ``compute_masks`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("compute_masks", sys.argv[1:], "python -m entrypoints.compute_masks"))
