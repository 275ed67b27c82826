"""What transformers makes of a config.json: every value, and the name and shape of every tensor. No weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_ft.errors import UserError
from sparse_ft.models.families import architecture_of
from sparse_ft.models.folder import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Skeleton", "build_skeleton", "config_values", "model_config"]

_NO_SIZES = ("dtype", "architectures", "transformers_version")  # what may differ between models of equal tensors


@dataclass(frozen=True)
class Skeleton:
    """The tensors of a model, by their names in the loaded model, on the meta device.

    Attributes:
        tensors: every parameter and every buffer that is stored.
        tied: names among them that need no tensor of their own: they are another's.
    """

    tensors: Mapping[str, torch.Tensor]
    tied: frozenset[str]


def model_config(path: str | Path) -> PretrainedConfig:
    """The configuration as transformers reads it, with its defaults for what the file leaves out.

    A ``quantization_config`` is left out: weights that are read here are plain ones, and transformers would
    quantise them again, or refuse to save them.

    Args:
        path: a folder with ``config.json``, or that file.

    Raises:
        UserError: none there, an architecture that is not supported, or values that transformers refuses.
    """
    from transformers import AutoConfig

    file = _config_file(path)
    architecture_of(read_json(file))
    try:
        config = AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class has its own ways to refuse a value
        raise UserError(f"transformers cannot read {file}: {type(error).__name__}: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def config_values(path: str | Path) -> dict[str, Any]:
    """All values of `model_config`, defaults of its class included, as ``save_pretrained`` writes them.

    Args:
        path: as `model_config` takes it.
    """
    file = _config_file(path)
    return copy.deepcopy(_values(_ConfigFile(file.read_bytes(), file)))


@dataclass(frozen=True)
class _ConfigFile:
    content: bytes
    path: Path = field(compare=False)


@lru_cache(maxsize=16)  # a study opens hundreds of checkpoints of a few configurations
def _values(file: _ConfigFile) -> dict[str, Any]:
    return model_config(file.path).to_diff_dict()


def _config_file(path: str | Path) -> Path:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"Checkpoint {file.parent} has no config.json.")
    return file


def build_skeleton(values: Mapping[str, Any]) -> Skeleton:
    """The tensors of the model that transformers builds from a configuration; takes some 50 ms at any size.

    Args:
        values: see `config_values`.

    Raises:
        UserError: transformers cannot build one.
    """
    sizes = {name: value for name, value in values.items() if name not in _NO_SIZES}
    return _built(json.dumps(sizes, sort_keys=True))


@lru_cache(maxsize=16)  # a study opens hundreds of checkpoints of a few shapes
def _built(values: str) -> Skeleton:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(values)))
    except Exception as error:  # an unknown activation, sizes that do not go together, ...
        raise UserError(
            f"transformers cannot build the model that config.json describes: {type(error).__name__}: {error}"
        ) from error
    return Skeleton(dict(model.state_dict()), frozenset(getattr(model, "all_tied_weights_keys", None) or {}))
