"""``python -m entrypoints.unpack``, the entry point ``unpack`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("unpack", sys.argv[1:], "python -m entrypoints.unpack"))
