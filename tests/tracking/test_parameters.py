"""Configurations as MLflow's strings."""

import dataclasses
import enum
from pathlib import Path

from sparse_ft.tracking.parameters import flatten_config


class Mode(enum.Enum):
    DENSE = "dense"


@dataclasses.dataclass
class Lora:
    r: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


def test_flatten_config():
    config = {
        "lora": Lora(),
        "sparsity": 0.50,
        "data_dir": None,
        "mode": Mode.DENSE,
        "out": Path("/x"),
        "on": True,
    }
    assert flatten_config(config) == {
        "cfg/lora/r": "16",
        "cfg/lora/alpha": "32.0",
        "cfg/lora/target_modules": '["q_proj", "v_proj"]',
        "cfg/sparsity": "0.5",
        "cfg/data_dir": "none",
        "cfg/mode": "dense",
        "cfg/out": "/x",
        "cfg/on": "true",
    }
    assert flatten_config({"a": {}}, prefix="") == {} and flatten_config({"a": 1}, prefix="") == {"a": "1"}
