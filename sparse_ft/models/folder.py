"""Which files of a folder are the model's weights: those that transformers loads, and no others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.errors import UserError

__all__ = ["PACKED", "PACKED_PREFIX", "WeightFiles", "is_packed", "read_json", "weight_files"]

PACKED = "packed.json"  # what a folder of packed weights has, and no other
PACKED_PREFIX = "packed."  # before the names of its files of weights

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model, in the order in which a later one's tensor replaces an earlier one's.

    Attributes:
        index: the index that lists them; None for one whole file.
        indexed: the tensor names in the index.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    indexed: frozenset[str] = frozenset()


def weight_files(folder: str | Path) -> WeightFiles:
    """The files that ``from_pretrained(folder, use_safetensors=True)`` reads, found as transformers finds them.

    The file that ``transformers_weights`` in config.json names; else ``model.safetensors``, whatever lies beside
    it; else the shards that ``model.safetensors.index.json`` lists. Anything else in the folder is no weight.

    Raises:
        UserError: no such folder or files; a damaged index; an adapter, which transformers would put on top of
            the weights; the shards of a distributed checkpoint, which it would read instead; a packed
            checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"Checkpoint {folder}: there is no such folder.")
    if (folder / "adapter_config.json").exists():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"Checkpoint {folder} holds an adapter and not a model; merge it into its base model first."
            )
        raise UserError(
            f"Checkpoint {folder} holds an adapter beside its weights (adapter_config.json), which transformers would"
            " put on top of them: merge it, or move it to another folder."
        )
    if is_packed(folder):
        raise UserError(
            f"Checkpoint {folder} is packed (kept values and bits): give it to sparse-ft unpack, or load it with"
            " from_packed."
        )
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise UserError(
            f"Checkpoint {folder} is a distributed one (shard-*-model-*.safetensors): load it with transformers and"
            " save it with save_pretrained."
        )
    named = _named(folder)
    if named is not None and not named.endswith(".json"):
        return WeightFiles((folder / named,))
    if named is None and (folder / _WHOLE).is_file():
        return WeightFiles((folder / _WHOLE,))
    index = folder / (named or _INDEX)
    if not index.is_file():
        raise UserError(_nothing(folder))
    content = read_json(index)
    weight_map = _weight_map(index, content)
    files = tuple(folder / name for name in sorted(set(weight_map.values())))
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise UserError(
            f"Checkpoint {folder} is incomplete: {len(lost)} of {len(files)} shards are missing ({lost[0]})."
        )
    if not isinstance(content.get("metadata"), dict):
        raise UserError(f'{index} has no metadata, without which transformers does not read it: add "metadata": {{}}.')
    return WeightFiles(files, index, frozenset(weight_map))


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (Path(folder) / PACKED).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged or not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object.")
    return content


def _named(folder: Path) -> str | None:
    """The file that config.json says the weights are in, which is rare."""
    path = folder / "config.json"
    named = read_json(path).get("transformers_weights") if path.is_file() else None
    if named is None:
        return None
    suffixes = (".safetensors", ".safetensors.index.json")
    if not _is_plain(named) or not named.endswith(suffixes) or not (folder / named).is_file():
        raise UserError(f"{path}: transformers_weights is {named!r}, which is no safetensors file of this folder.")
    return named


def _weight_map(index: Path, content: dict[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is damaged: it has no weight_map.")
    for name, file in weight_map.items():
        if not _is_plain(file) or not file.endswith(".safetensors"):
            raise UserError(f"{index} is damaged: {name} is in {file!r}, which is no safetensors file of this folder.")
    return weight_map


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and "\0" not in name and Path(name).name == name


def _nothing(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return f"Checkpoint {folder} has no config.json and no {_WHOLE}, so it is no Hugging Face checkpoint."
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return (
            f"Checkpoint {folder} has neither {_WHOLE} nor {_INDEX}, one of which transformers needs; {others[0]}{more}"
            " alone cannot be loaded: rename a whole file, or restore the index of the shards."
        )
    return (
        f"Checkpoint {folder} has no {_WHOLE} and no {_INDEX}. Pickled .bin weights are not read: convert them with"
        " transformers' save_pretrained."
    )
