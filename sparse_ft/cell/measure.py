"""What sparsity buys: bytes and tokens per second of every form that a model has under its masks. All of it measured.

A form that these masks do not allow, or that this machine cannot run, is absent, with the reason.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparse_ft.errors import UserError
from sparse_ft.evaluation.speed import Speed, held_bytes, measure_speed
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.memory import release_memory
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.models.devices import resolve_device, resolve_dtype
from sparse_ft.models.loading import apply_masks, load_model
from sparse_ft.models.mixtures import refitted
from sparse_ft.models.names import slots
from sparse_ft.models.packing import is_masked, pack_checkpoint
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.shrink import shrink_checkpoint
from sparse_ft.settings import modes
from sparse_ft.settings.commands import MeasureSettings

__all__ = ["FORMS", "Form", "Measurement", "lines", "measure_forms"]

FORMS = (modes.DENSE.name, "masked", "shrunk", "semi_structured", "packed")
DENSE, MASKED, SHRUNK, SEMI_STRUCTURED, PACKED = FORMS


@dataclass(frozen=True)
class Form:
    """One form of a model.

    Attributes:
        name: of `FORMS`.
        disk: bytes of its files of weights; None: it has none.
        memory: bytes of its parameters and buffers when it is loaded; None: it was not.
        speeds: at every batch size.
    """

    name: str
    disk: int | None = None
    memory: int | None = None
    speeds: tuple[Speed, ...] = ()

    def metrics(self) -> dict[str, float]:
        """``measure/FORM/...``."""
        values = {"disk_bytes": self.disk, "memory_bytes": self.memory}
        for speed in self.speeds:
            values[f"prefill_tokens_per_second_batch_{speed.batch}"] = speed.prefill
            values[f"decoding_tokens_per_second_batch_{speed.batch}"] = speed.decoding
        return {f"measure/{self.name}/{name}": value for name, value in values.items() if value is not None}


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        forms: those that there are.
        absent: why the others are not, by name.
        protocol: under which all of it was measured.
    """

    forms: list[Form] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, str | int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Of all forms."""
        return {name: value for form in self.forms for name, value in form.metrics().items()}


def measure_forms(
    folder: str | Path,
    masks: MaskSet | None,
    settings: MeasureSettings,
    scratch: Path,
    progress: Progress = SILENT,
    loaded: PreTrainedModel | None = None,
) -> Measurement:
    """Bytes and speeds of a checkpoint's forms, one after another: one model is in memory at a time.

    Args:
        folder: a plain checkpoint. Where its weights are not masked yet, it is the dense form as well.
        masks: of its prunable tensors; None: of a dense model, which has no other form.
        settings: lengths, repeats, precision and device.
        scratch: a folder for the forms that are not there: up to two copies of the weights.
        progress: told about the forms.
        loaded: the checkpoint's model, where it is in memory; it stays as it is.

    Raises:
        UserError: masks of another model, or prompts that are longer than the model reads.
    """
    checkpoint = Checkpoint(folder)
    if masks is not None:
        shapes = checkpoint.prunable_shapes()
        masks = refitted(checkpoint.config, masks, shapes)
        check_masks(masks, shapes, f"the checkpoint {checkpoint.folder}")
    longest = checkpoint.config.get("max_position_embeddings")
    if longest is not None and settings.prompt_tokens + settings.new_tokens > longest:
        raise UserError(
            f"prompt_tokens and new_tokens are {settings.prompt_tokens} and {settings.new_tokens}; the model reads no"
            f" more than {longest} tokens."
        )
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    found = Measurement(protocol=_protocol(settings, dtype, device))
    already = masks is not None and is_masked(checkpoint, masks)
    progress.start("measure", len(FORMS), "forms")
    try:
        model = loaded if masks is None or already else None  # else its weights are masked below
        model = load_model(checkpoint.folder, dtype, device) if model is None else model
        plain = checkpoint
        if masks is None:
            found.forms.append(_measured(DENSE, model, settings, checkpoint))
            return found
        if already:
            found.absent[DENSE] = "the checkpoint is masked already"
        else:
            found.forms.append(_measured(DENSE, model, settings, checkpoint))
            apply_masks(model, masks)
            plain = Checkpoint(copy_checkpoint(checkpoint, scratch / MASKED, _masking(masks)))
        progress.advance(note=DENSE)
        found.forms.append(_measured(MASKED, model, settings, plain))
        progress.advance(note=MASKED)
        if (why := _no_semi_structured(model, masks)) is None:
            try:
                model = load_model(plain.folder, dtype, device) if model is loaded else model
                _to_semi_structured(model, masks)
                found.forms.append(_measured(SEMI_STRUCTURED, model, settings))
            except (RuntimeError, ValueError) as error:  # shapes, or a build of torch, that it cannot do it with
                why = f"torch refuses: {' '.join(str(error).split())[:200]}"
        if why is not None:
            found.absent[SEMI_STRUCTURED] = why
        progress.advance(note=SEMI_STRUCTURED)
        del model
        release_memory()
        try:
            smaller = Checkpoint(shrink_checkpoint(plain.folder, masks, scratch / SHRUNK))
        except UserError as error:
            found.absent[SHRUNK] = str(error)
        else:
            found.forms.append(_measured(SHRUNK, load_model(smaller.folder, dtype, device), settings, smaller))
            shutil.rmtree(smaller.folder)
        progress.advance(note=SHRUNK)
        packed = pack_checkpoint(plain, masks, scratch / PACKED)
        found.forms.append(Form(PACKED, disk=_disk(packed)))
        progress.advance(note=PACKED)
    finally:
        progress.stop()
        release_memory()
    return found


def _measured(
    name: str, model: PreTrainedModel, settings: MeasureSettings, checkpoint: Checkpoint | None = None
) -> Form:
    speeds = tuple(
        measure_speed(model, batch, settings.prompt_tokens, settings.new_tokens, settings.repeats)
        for batch in settings.batches
    )
    return Form(name, None if checkpoint is None else _disk(checkpoint), held_bytes(model), speeds)


def _disk(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.weights.files)


def _masking(masks: MaskSet) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def masked(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.masked_fill_(~masks[name], 0) if name in masks.shapes else tensor

    return masked


def _no_semi_structured(model: PreTrainedModel, masks: MaskSet) -> str | None:
    """Why torch's semi-structured tensors cannot hold the model; None: they may."""
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        return "torch's semi-structured tensors need a CUDA device of capability 8.0 or more"
    if model.dtype not in (torch.float16, torch.bfloat16):
        return f"torch's semi-structured tensors need float16 or bfloat16, and the model is {model.dtype}"
    if any(place.index for place in slots(model.config.to_dict(), masks.shapes).values()):
        return "the experts of a mixture are no single matrices"
    for name in masks:
        mask = masks[name]
        if mask.ndim != 2 or mask.shape[1] % 4 or int(mask.view(mask.shape[0], -1, 4).sum(-1).max()) > 2:
            return f"the masks are not 2:4 (of 4 weights in a row at most 2): {name}"
    return None


def _to_semi_structured(model: PreTrainedModel, masks: MaskSet) -> None:
    """Puts semi-structured tensors in the place of the masked weights."""
    from torch.sparse import to_sparse_semi_structured

    for place in slots(model.config.to_dict(), masks.shapes).values():
        module = model.get_submodule(place.parameter.removesuffix(".weight"))
        sparse = to_sparse_semi_structured(module.weight.detach())
        module.weight = torch.nn.Parameter(sparse, requires_grad=False)


def _protocol(settings: MeasureSettings, dtype: torch.dtype, device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "statistic": "median after one warm-up",
        "dtype": str(dtype).removeprefix("torch."),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def lines(found: Measurement) -> Iterator[str]:
    """For a terminal: a table of the forms, why others are absent, and the protocol."""
    batches = sorted({speed.batch for form in found.forms for speed in form.speeds})
    heads = [f"{what} {batch}" for batch in batches for what in ("read", "write")]
    yield f"{'form':16}{'on disk':>16}{'in memory':>16}" + "".join(f"{head:>12}" for head in heads)
    for form in found.forms:
        numbers = [value for speed in form.speeds for value in (speed.prefill, speed.decoding)]
        held = "".join(f"{'-' if value is None else format(value, ','):>16}" for value in (form.disk, form.memory))
        yield f"{form.name:16}{held}" + "".join(f"{value:12,.1f}" for value in numbers)
    for name, why in found.absent.items():
        yield f"{name}: absent, {why}"
    yield "bytes; tokens/s of reading prompts and of writing, at each batch size: " + ", ".join(
        f"{name} {value}" for name, value in found.protocol.items()
    )
