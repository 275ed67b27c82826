"""Whole models in memory: load, mask, restore, save. The checkpoint's tensor names rule throughout."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sparse_ft.errors import UserError
from sparse_ft.files import atomic_folder
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import resolve_device, resolve_dtype
from sparse_ft.models.families import TEXT_NAMES, architecture_of
from sparse_ft.models.hollow import is_hollow
from sparse_ft.models.names import has_fused_experts, listed_shapes, place, prunable_names, slots
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.models.packed import PackedCheckpoint
from sparse_ft.models.skeleton import model_config
from sparse_ft.models.tokenizers import leave_open, pad_inside
from sparse_ft.progress import SILENT, Progress

__all__ = [
    "apply_masks",
    "from_packed",
    "load_model",
    "load_state_into",
    "load_tensors_into",
    "load_tokenizer",
    "prunable_shapes",
    "quiet_transformers",
    "save_model",
    "saved_tokenizer",
]


def load_model(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
) -> PreTrainedModel:
    """The causal language model of a Hugging Face folder, in eval mode, ready to run.

    Only safetensors are read and no code from the folder is run. Attention is ``sdpa``, or what the family's row says.

    Args:
        folder: ``config.json`` and ``model*.safetensors`` with every weight of the model; of a multimodal model the
            text part is loaded; or a packed folder.
        dtype: of the parameters, or a name for `resolve_dtype`.
        device: or a name for `resolve_device`.

    Raises:
        UserError: no checkpoint there, an unreadable one, or one that lacks weights. transformers would
            initialise those at random and go on, as happens with an adapter that was never merged.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    dtype = resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype
    checkpoint = open_checkpoint(folder)
    checkpoint.check()  # says in one line what transformers says in a page, or a traceback
    config, packed = model_config(folder), isinstance(checkpoint, PackedCheckpoint)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if packed else AutoModelForCausalLM
    with quiet_transformers():
        try:
            model, report = kind.from_pretrained(
                None if packed else str(folder),
                config=config,
                state_dict=_restoring(checkpoint) if packed else None,
                dtype=dtype,
                attn_implementation=architecture_of(config.to_dict()).attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                device_map={"": device} if device.type != "cpu" else None,
                output_loading_info=True,
                key_mapping=TEXT_NAMES if checkpoint.is_multimodal else None,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{folder} cannot be loaded as a language model: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(str(name) for name in report[problem])
            raise UserError(
                f"{folder} does not hold the whole model: {len(names)} {problem.replace('_', ' ')}, first "
                f"{names[0]}; is it an adapter that was not merged, or a checkpoint of another configuration?"
            )
    if packed:  # what transformers takes from a folder
        model.config.name_or_path = model.name_or_path = str(folder)
        if (checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    if checkpoint.is_multimodal:  # or it would be saved under the names of the whole, of which it is a part
        del model._weight_conversions
    return model.eval()


def from_packed(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
) -> PreTrainedModel:
    """The model of a packed folder, as `load_model` gives it, without a plain file in between.

    Weights are restored as transformers asks for them: memory holds the model and a few tensors more.

    Args:
        folder: that ``sparse-ft pack`` wrote.
        dtype: as `load_model` takes it.
        device: as `load_model` takes it.

    Raises:
        UserError: a folder that is not packed, a damaged one, or what `load_model` refuses.
    """
    PackedCheckpoint(folder)
    return load_model(folder, dtype, device)


class _Restored:
    """A tensor of a packed checkpoint that is restored when it is asked for: a slice of safetensors to transformers."""

    def __init__(self, checkpoint: PackedCheckpoint, name: str):
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.tensor(self._name)[index]

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.shape(self._name))


def _restoring(checkpoint: PackedCheckpoint) -> dict[str, _Restored]:
    """The tensors by the names of the files."""
    return {entry.name: _Restored(checkpoint, name) for name, entry in checkpoint.stored.items()}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, as training, scoring, calibration and perplexity use it.

    It puts nothing after a text (``add_eos_token`` or a template that closes every text is undone), and its pad
    token is one that the model's embedding has: without such a token (LLaMA-2) it pads with its end token.

    Raises:
        UserError: there is none, it cannot be read, has no usable pad or end token, or is of another model.
    """
    tokenizer = saved_tokenizer(folder)
    pad_inside(tokenizer, folder)
    leave_open(tokenizer, folder)
    return tokenizer


def saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder as it is there, to be saved beside a model made of that folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    max_shard_size: str = "2GB",
    progress: Progress = SILENT,
) -> Path:
    """Writes a plain Hugging Face checkpoint; the folder appears when it is complete.

    Tied weights are stored once, and the experts of a Mixtral under the names its hub checkpoints use.
    An earlier checkpoint in that place is replaced.

    Args:
        model: with no adapters.
        tokenizer: saved beside it; None: none.
        folder: to be written.
        max_shard_size: of one file. Saving takes memory for no more than two of them, reading for one
            (a tensor that is larger than that has a file of its own).
        progress: told when all of it is written.

    Raises:
        UserError: the folder holds something that is no checkpoint.
        ValueError: the model has unmerged adapters.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise UserError(f"{folder} exists and holds something else than a checkpoint; choose another folder")
    unmerged = [name for name, _ in model.named_parameters() if "lora_" in name or ".base_layer." in name]
    if unmerged:
        raise ValueError(f"merge the adapters first: the model has {unmerged[0]}")
    _repair_generation_config(model)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    progress.start("save", size, "B")
    with quiet_transformers(), atomic_folder(folder) as part, _shard_by_shard(model):
        model.save_pretrained(part, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        mode = (part / "config.json").stat().st_mode
        for file in part.glob("*.safetensors"):  # safetensors writes them for the owner's eyes only
            file.chmod(mode)
    progress.advance(size)
    progress.stop()
    return folder


@contextmanager
def _shard_by_shard(model: PreTrainedModel) -> Iterator[None]:
    """Has ``save_pretrained`` split fused experts when it writes them.

    It splits those of all blocks before it writes any, half a copy of a Mixtral, unless the model says that it is
    partly on a CPU.
    """
    own = vars(model).get("hf_device_map")
    model.hf_device_map = {"": "cpu"}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield
    finally:
        del model.hf_device_map
        if own is not None:
            model.hf_device_map = own


def prunable_shapes(model: PreTrainedModel, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of a loaded model's prunable tensors, by checkpoint name, in name order.

    Args:
        model: plain (not wrapped), of a supported family.
        fused: name the experts of a block as transformers holds them, as 3-D tensors, and not one by one.
    """
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config, shapes = model.config.to_dict(), {}
    for name in prunable_names(config, parameters):
        shapes |= {name: parameters[name]} if fused else listed_shapes(config, name, parameters[name])
    return dict(sorted(shapes.items()))


@torch.no_grad()
def apply_masks(model: PreTrainedModel, masks: MaskSet) -> None:
    """Sets every masked weight of the model to zero (+0.0, even where it was negative), in place. Of a model without
    weights (`sparse_ft.models.hollow`) the shapes are looked at.

    Raises:
        UserError: the masks are not exactly those of this model's prunable tensors; nothing was changed.
    """
    config = model.config.to_dict()
    check_masks(masks, prunable_shapes(model, fused=has_fused_experts(config, masks.shapes)))
    for name, slot in slots(config, masks.shapes).items():
        weight = slot.view(model.get_parameter(slot.parameter))
        if not is_hollow(weight):
            weight.masked_fill_(~masks[name].to(weight.device), 0)


@torch.no_grad()
def load_state_into(
    model: PreTrainedModel, checkpoint: Checkpoint | str | Path, names: Iterable[str] | None = None
) -> None:
    """Copies a checkpoint's weights into a model of the same architecture that is already in memory.

    A worker that keeps its base model undoes in this way what pruning or training did to it, in the time
    of a copy instead of a load.

    Args:
        model: a plain (not wrapped) model; its dtype and device stay, values are rounded to that dtype.
        checkpoint: where the weights are.
        names: the checkpoint tensors to restore; by default all that the model has a place for.

    Raises:
        UserError: a tensor that the checkpoint or the model does not have, or of another shape.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    parameters = dict(model.named_buffers(remove_duplicate=False))  # a router's correction of its choice is one
    parameters |= dict(model.named_parameters(remove_duplicate=False))
    load_tensors_into(parameters, checkpoint, checkpoint.names if names is None else names)


@torch.no_grad()
def load_tensors_into(parameters: Mapping[str, torch.Tensor], checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Copies tensors of a checkpoint into parameters, as `load_state_into` does.

    Args:
        parameters: of a model of the same architecture, by their names in the plain model.
        checkpoint: where the weights are.
        names: the checkpoint tensors.

    Raises:
        UserError: a tensor that the checkpoint or the model does not have, or of another shape.
    """
    wanted = set(names)
    targets: dict[Path, dict[str, torch.Tensor]] = defaultdict(dict)
    for name in sorted(wanted):
        slot = place(checkpoint.config, name)
        shape = checkpoint.shape(name)
        if slot.parameter not in parameters:
            raise UserError(f"the model has no parameter for {name} of {checkpoint.folder}")
        target = slot.view(parameters[slot.parameter])
        if tuple(target.shape) != shape:
            raise UserError(f"{name} is {shape} in {checkpoint.folder} and {tuple(target.shape)} in the model")
        targets[checkpoint.shard(name)][name] = target
    for file, tensors in targets.items():
        with safe_open(file, framework="pt") as source:  # mapped, so the bytes are copied once
            for name, target in tensors.items():
                stored = checkpoint.is_stored(name)
                target.copy_(source.get_tensor(checkpoint.stored_name(name)) if stored else checkpoint.tensor(name))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back the progress bars of transformers, which would break into the caller's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _repair_generation_config(model: PreTrainedModel) -> None:
    """Makes a generation config savable that its own publisher wrote against the rules.

    Some hub checkpoints (LLaMA-2 among them at first) set a temperature without sampling; transformers
    loads that with a warning and then refuses to save it. Sampling is what such a config meant.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
