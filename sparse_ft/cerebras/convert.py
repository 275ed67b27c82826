"""Hugging Face <-> ``.mdl`` through ModelZoo's converter, with what it needs put before it and what it leaves tidied.

The converter of ModelZoo 2.10 knows the format as ``cs-2.9`` (``cs-current`` and ``cs-auto`` fail), takes safetensors
only with an index, reads the configuration in the words of transformers 4, and knows a mixture's experts one by one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from safetensors.torch import load_file, save_file

from sparse_ft.cerebras.model_section import converter_config, model_section
from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder, write_json
from sparse_ft.models.cerebras.checkpoint import listed_names, read_listed
from sparse_ft.models.cerebras.names import places
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of

__all__ = ["FORMAT", "to_hugging_face", "to_modelzoo"]

FORMAT = "cs-2.9"
Run = Callable[[Sequence[str]], None]


def to_modelzoo(folder: str | Path, target: str | Path, python: str = sys.executable, run: Run | None = None) -> Path:
    """Converts a Hugging Face folder into ``target`` (``.mdl``), with ``config.json`` beside it.

    Args:
        python: the interpreter of the environment with ModelZoo.

    Raises:
        UserError: a model that ModelZoo cannot take, or the converter's last words where it fails.
    """
    source, target = Checkpoint(folder), Path(target)
    places(source.config)  # refuses what the converter gets wrong
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".convert-") as temporary:
        staged = _stage(source, Path(temporary))
        out = Path(temporary) / "out"
        index = staged / "model.safetensors.index.json"
        _convert(source.config["model_type"], "hf", FORMAT, staged / "config.json", out, index, python, run)
        os.replace(out / f"model_to_{FORMAT}.mdl", target)
    write_json(target.parent / "config.json", source.config)  # its defaults too: who reads it may have others
    return target


def to_hugging_face(
    merged: str | Path,
    origin: str | Path,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    python: str = sys.executable,
    run: Run | None = None,
) -> Path:
    """Converts a merged ``.mdl`` back into a Hugging Face folder: safetensors, tokenizer, the origin's config.

    Args:
        merged: plain weights (`merge_checkpoint`); with a LoRA or masks the converter fails.
        origin: the Hugging Face folder that the training started from.
        dtype: rounds the weights to this dtype; None leaves them as trained, float32.

    Raises:
        UserError: the converter's last words where it fails.
    """
    source = Checkpoint(origin)
    with TemporaryDirectory(dir=Path(merged).parent, prefix=".convert-") as temporary:
        file = Path(temporary) / "config.yaml"
        section = {**model_section(source.config), "norm_first": True, "use_ff_layer1_dropout": False}
        file.write_text(yaml.safe_dump({"model": section}), encoding="utf-8")
        out = Path(temporary) / "out"
        options = ["--export-safetensors"]
        _convert(section["name"], FORMAT, "hf", file, out, Path(merged), python, run, options)
        shards = sorted(out.glob("**/*.safetensors"))
        with atomic_folder(folder) as target:
            _copy_companions(source.folder, target)
            found = _write_shards(shards, source, target, dtype)
            config = source.config if source.is_multimodal else source.stored_config
            write_json(target / "config.json", {**config, "dtype": str(found).removeprefix("torch.")})
    return Path(folder)


def _write_shards(shards: list[Path], source: Checkpoint, target: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Copies the converter's shards under transformers' names; a tied head is left out, as transformers does."""
    tied, found, weight_map = bool(source.config.get("tie_word_embeddings")), torch.float32, {}
    for number, shard in enumerate(shards, 1):
        tensors = load_file(shard)
        if tied:
            tensors.pop(architecture_of(source.config).head_weight, None)
        tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        found = next(iter(tensors.values())).dtype
    if len(shards) > 1:
        write_json(target / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return found


def _copy_companions(origin: Path, target: Path) -> None:
    for file in origin.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in file.name:
            shutil.copy2(file, target / file.name)


def _stage(source: Checkpoint, folder: Path) -> Path:
    """A folder with index and transformers 4 configuration around the same files; fused experts are split."""
    staged = folder / "hf"
    staged.mkdir()
    weight_map = {}
    if not all(map(source.is_stored, source.names)):
        weight_map = _split_experts(source, staged)
    else:
        for file in source.files:
            (staged / file.name).symlink_to(file.resolve())
        weight_map = {name: source.shard(name).name for name in source.names}
    write_json(staged / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(staged / "config.json", converter_config(source.config))
    return staged


def _split_experts(source: Checkpoint, staged: Path) -> dict[str, str]:
    weight_map = {}
    blocks = architecture_of(source.config).blocks
    by_block: dict[str, list[str]] = {}
    for name in listed_names(source, places(source.config)):
        number = name.removeprefix(f"{blocks}.").split(".")[0] if name.startswith(f"{blocks}.") else "rest"
        by_block.setdefault(number, []).append(name)
    for block, members in by_block.items():
        tensors = {name: read_listed(source, name).contiguous() for name in members}
        file = f"model-{block}.safetensors"
        save_file(tensors, staged / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    return weight_map


def _convert(
    kind: str,
    source_format: str,
    target_format: str,
    config: Path,
    out: Path,
    checkpoint: Path,
    python: str,
    run: Run | None,
    options: Sequence[str] = (),
) -> None:
    command = [
        python, "-m", "sparse_ft.cerebras.modelzoo.cszoo", "checkpoint", "convert", "--model", kind,
        "--src-fmt", source_format, "--tgt-fmt", target_format, "--config", str(config),
        "--output-dir", str(out), "--no-progress-bar", *options, str(checkpoint),
    ]  # fmt: skip
    if run is not None:
        run(command)
        return
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not any(out.glob("**/*")):
        words = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        raise UserError(f"ModelZoo's converter failed on {checkpoint}: {words[-1] if words else 'no message'}")
