"""``python -m entrypoints.cerebras_configs``: a ModelZoo trainer configuration for every cell of a study."""

from entrypoints._command import command
from sparse_ft.study.cerebras_configs import CerebrasConfigsConfig, write_configs

if __name__ == "__main__":
    command("cerebras_configs", CerebrasConfigsConfig, write_configs)
