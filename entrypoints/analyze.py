"""``python -m entrypoints.analyze``, the entry point ``analyze`` of the MLflow project."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("analyze", sys.argv[1:], "python -m entrypoints.analyze"))
