"""``python -m entrypoints.cerebras_configs``: a ModelZoo trainer configuration for every cell of a study."""

import sys

from sparse_ft.cli import run

if __name__ == "__main__":
    sys.exit(run("cerebras_configs", sys.argv[1:], "python -m entrypoints.cerebras_configs"))
