"""What transformers makes of a config.json: every value, and the name and shape of every tensor. No weights.

transformers itself is asked, once: importing it takes longer than most of what needs the answers, so they are kept in
the project's cache, by the question and by the code that answered it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_ft.cache import cache_dir
from sparse_ft.errors import UserError
from sparse_ft.files import write_text
from sparse_ft.models.families import architecture_of, is_multimodal
from sparse_ft.models.folder import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Skeleton", "build_skeleton", "config_values", "model_config"]

_NO_SIZES = ("dtype", "architectures", "transformers_version")  # what may differ between models of equal tensors


@dataclass(frozen=True)
class Skeleton:
    """The tensors of a model, by their names in the loaded model.

    Attributes:
        tensors: the shape of every parameter and every buffer that is stored.
        tied: names among them that need no tensor of their own: they are another's.
    """

    tensors: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]


def model_config(path: str | Path) -> PretrainedConfig:
    """The configuration as transformers reads it, with its defaults for what the file leaves out.

    A ``quantization_config`` is left out: weights that are read here are plain ones, and transformers would
    quantise them again, or refuse to save them. Of a multimodal model it is the configuration of the text part.

    Args:
        path: a folder with ``config.json``, or that file.

    Raises:
        UserError: none there, an architecture that is not supported, or values that transformers refuses.
    """
    from transformers import AutoConfig

    file = _config_file(path)
    stored = read_json(file)
    architecture_of(stored)
    try:
        config = AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class has its own ways to refuse a value
        said = " ".join(str(error).split())
        raise UserError(f"transformers cannot read {file}: {type(error).__name__}: {said}") from error
    if is_multimodal(stored):
        config = config.get_text_config()
        if "tie_word_embeddings" in stored and "tie_word_embeddings" not in stored.get("text_config", {}):
            config.tie_word_embeddings = stored["tie_word_embeddings"]
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
    kind = architecture_of(read_json(file.path)).model_type
    return _answered(kind, "values", file.content, lambda: model_config(file.path).to_diff_dict())


def _config_file(path: str | Path) -> Path:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"Checkpoint {file.parent} has no config.json.")
    return file


def build_skeleton(values: Mapping[str, Any]) -> Skeleton:
    """The tensors of the model that transformers builds from a configuration.

    Args:
        values: see `config_values`.

    Raises:
        UserError: transformers cannot build one.
    """
    sizes = {name: value for name, value in values.items() if name not in _NO_SIZES}
    return _skeleton(json.dumps(sizes, sort_keys=True))


@lru_cache(maxsize=16)  # a study opens hundreds of checkpoints of a few shapes
def _skeleton(values: str) -> Skeleton:
    kind = str(json.loads(values).get("model_type"))
    tensors, tied = _answered(kind, "tensors", values.encode(), lambda: _built(values))
    return Skeleton({name: tuple(shape) for name, shape in tensors.items()}, frozenset(tied))


def _built(values: str) -> list[Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(values)))
    except Exception as error:  # an unknown activation, sizes that do not go together, ...
        raise UserError(
            "transformers cannot build the model that config.json describes:"
            f" {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    tied = sorted(getattr(model, "all_tied_weights_keys", None) or {})
    return [{name: list(tensor.shape) for name, tensor in model.state_dict().items()}, tied]


def _answered(kind: str, question: str, about: bytes, ask: Callable[[], Any]) -> Any:
    """What transformers answers: from the cache where it was asked before, and is the same in every file that matters.

    An answer that JSON would change is not kept; without a cache folder nothing is.
    """
    try:
        asked = hashlib.sha256(json.dumps([question, *_answering(kind)]).encode() + about).hexdigest()
        file = cache_dir() / "transformers" / f"{question}-{asked[:32]}.json"
    except UserError:
        return ask()
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    answer = ask()
    text = json.dumps(answer, default=str)
    if json.loads(text) == answer:
        with suppress(OSError):
            write_text(file, text)
    return answer


def _answering(kind: str) -> list[Any]:
    """Version, sizes and times of the code of transformers that describes models of a kind."""
    package = Path(find_spec("transformers").origin).parent
    home = package / "models" / kind.removesuffix("_text")
    files = [*sorted(package.glob("*.py")), *sorted(home.glob("*.py"))]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [version("transformers"), stamps]
