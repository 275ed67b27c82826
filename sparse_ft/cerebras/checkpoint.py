"""Checkpoints on their way to a wafer and back: masks and adapters put in, trained adapters merged under the mask.

Everything streams over the HDF5 files, with a few tensors in memory; neither cerebras.pytorch nor ModelZoo is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_ft.cerebras.masked_lora import merged_weight
from sparse_ft.errors import UserError
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.cerebras.checkpoint import listed_names, read_listed
from sparse_ft.models.cerebras.mdl import MdlFile, write_mdl
from sparse_ft.models.cerebras.names import Place, places, strip_prefix
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import prunable_names, slots
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.modes import MODES, TRAINED_MODES

__all__ = ["LoraPlan", "ModelZooMasks", "merge_checkpoint", "write_start_checkpoint"]


@dataclass(frozen=True)
class LoraPlan:
    """Which linear maps ModelZoo's LoRA adapts, and how.

    ModelZoo chooses by the class names of the modules around a linear map, so attention and MLP can be told
    apart, but not the projections within them. Experts of a mixture are no linear maps there: they take no LoRA.

    Attributes:
        r: rank; alpha: the update is scaled by alpha / r.
        attention, mlp: what is adapted.

    Raises:
        UserError: a rank or alpha that is not positive, or nothing to adapt.
    """

    r: int = 16
    alpha: float = 32.0
    attention: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        if self.r < 1 or not self.alpha > 0:
            raise UserError(f"LoRA needs a positive rank and alpha; they are {self.r} and {self.alpha}.")
        if not (self.attention or self.mlp):
            raise UserError("LoRA with neither attention nor MLP adapts nothing.")

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @classmethod
    def of(cls, config: Mapping[str, Any], r: int, alpha: float, target_modules: tuple[str, ...] | None) -> LoraPlan:
        """The plan for projections named as everywhere in this project (None: all that can be).

        Raises:
            UserError: a choice that ModelZoo cannot make.
        """
        dense = architecture_of(config).projections
        attention = [projection.name for projection in dense if projection.is_attention]
        mlp = [projection.name for projection in dense if not projection.is_attention]
        if target_modules is None:
            return cls(r, alpha, attention=True, mlp=bool(mlp))
        chosen = set(target_modules)
        if chosen - set(attention) - set(mlp):
            raise UserError(
                f"target_modules {sorted(chosen)}: on ModelZoo a LoRA goes on attention ({', '.join(attention)}) and"
                f" {'the MLP (' + ', '.join(mlp) + ')' if mlp else 'not on the experts of a mixture'}."
            )
        for whole in (set(attention), set(mlp)):
            if (part := chosen & whole) and part != whole:
                raise UserError(
                    f"target_modules {sorted(chosen)}: ModelZoo's LoRA cannot adapt {', '.join(sorted(part))} without"
                    f" {', '.join(sorted(whole - part))}. Name all of them, or none."
                )
        return cls(r, alpha, bool(chosen & set(attention)), bool(chosen & set(mlp)))

    def adapted(self, config: Mapping[str, Any]) -> set[str]:
        """The Hugging Face tensors that get factors."""
        row = architecture_of(config)
        kinds = [p for p in row.projections if (self.attention if p.is_attention else self.mlp)]
        return {f"{row.block(b)}{p.path}.weight" for b in range(config["num_hidden_layers"]) for p in kinds}


class ModelZooMasks(Mapping[str, torch.Tensor]):
    """A mask set under ModelZoo's names (``transformer_decoder...``), row order and fused experts, made one by one.

    Raises:
        UserError: masks that do not fit the architecture.
    """

    def __init__(self, config: Mapping[str, Any], masks: MaskSet):
        self._places = places(config)
        names = prunable_names(config, self._places)
        self._masks = masks
        self._slots = slots(config, names)
        self._fused = set(masks.shapes) != set(names)  # a transformers 5 checkpoint: a block's experts in one tensor
        if self._fused and set(masks.shapes) != {slot.parameter for slot in self._slots.values()}:
            check_masks(masks, dict.fromkeys(names, ()))
        self._sources: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: (self._places[name].name, self._places[name].expert or 0)):
            self._sources.setdefault(self._places[name].name, []).append(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [self._places[source].to_modelzoo(self._mask(source)) for source in self._sources[name]]
        return parts[0].contiguous() if self._places[self._sources[name][0]].expert is None else torch.stack(parts, 1)

    def sparsity(self, name: str) -> float:
        """Fraction of the weights of a ModelZoo tensor that is pruned."""
        kept = total = 0
        for source in self._sources[name]:
            mask = None if not self._fused else self._mask(source)
            kept += self._masks.kept(source) if mask is None else int(mask.sum())
            total += self._masks.weights(source) if mask is None else mask.numel()
        return 1.0 - kept / total

    def _mask(self, name: str) -> torch.Tensor:
        return self._slots[name].view(self._masks[self._slots[name].parameter]) if self._fused else self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def write_start_checkpoint(
    source: Checkpoint,
    target: str | Path,
    masks: MaskSet | None = None,
    lora: LoraPlan | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Path:
    """Writes what ModelZoo's trainer starts from: every tensor it expects, so that it can load strictly.

    All names carry the ``model.`` of the trainer's module: with the converter's bare names cerebras.pytorch loads
    the masks but does not notice, and draws random ones over them. A tied head is written (the trainer asks for
    it), masked weights are zero, masks are boolean tensors ``NAME_mask``, and an adapter starts as in PEFT and
    ModelZoo: A uniform (Kaiming, a = sqrt 5), B zero.

    Args:
        source: the converted model (`CerebrasCheckpoint`), or the Hugging Face folder itself.
        target: the ``.mdl`` to write.
        masks: by Hugging Face names; None for a dense start.
        lora: the adapter; None for full fine-tuning.
        seed: of A.

    Raises:
        UserError: masks that do not fit.
    """
    config = source.config
    where = places(config)
    by_name = {} if masks is None else ModelZooMasks(config, masks)
    adapted = set() if lora is None else lora.adapted(config)
    generator = torch.Generator().manual_seed(seed)
    progress.start("write Cerebras checkpoint", sum(source.nbytes(name) for name in source.names), "B")
    with write_mdl(target) as writer:
        for theirs, names in _by_place(where, source).items():
            weight = _gather(source, where, names)
            if theirs in by_name:
                mask = by_name[theirs]
                if mask.shape != weight.shape:
                    raise UserError(f"Mask of {names[0]} is {tuple(mask.shape)}, the weight {tuple(weight.shape)}.")
                weight = weight.masked_fill(~mask, 0)
                writer.write(f"model.{theirs}_mask", mask)
            writer.write(f"model.{theirs}", weight)
            if theirs == "transformer_decoder.norm.weight":
                writer.link("model.ln_f.weight", f"model.{theirs}")
            if names[0] in adapted:
                module = f"model.{theirs.removesuffix('.weight')}"
                bound = math.sqrt(1 / weight.shape[1])  # of Kaiming with a = sqrt 5
                factor = torch.rand(lora.r, weight.shape[1], generator=generator) * 2 * bound - bound
                writer.write(f"{module}.lora_A", factor)
                writer.write(f"{module}.lora_B", torch.zeros(weight.shape[0], lora.r))
            progress.advance(weight.nbytes)
        if architecture_of(config).head_weight not in source.names:
            writer.link("model.lm_head.weight", "model.embedding_layer.word_embeddings.weight")
    progress.stop()
    return Path(target)


def merge_checkpoint(
    trained: str | Path,
    target: str | Path,
    config: Mapping[str, Any],
    mode: str,
    masks: MaskSet | None = None,
    scaling: float | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Merges what the trainer saved into plain weights, which ModelZoo's converter takes back to Hugging Face.

    ``dense``: W + sBA. ``sparse_to_dense``: W.M + sBA. ``sparse_to_sparse``: W.M + (sBA).M, by the arithmetic of
    the training's own forward pass. ``full``: W.M. Masks and factors are gone afterwards, as are moments.

    Args:
        trained: the trainer's ``.mdl``.
        target: the ``.mdl`` to write.
        config: the Hugging Face model's configuration.
        masks: by Hugging Face names; needed by every mode but ``dense``.
        scaling: alpha / r of the adapter; needed by every mode but ``full``.

    Raises:
        UserError: an unknown mode, masks or scaling missing, masks that are not those the checkpoint was trained
            with, or factors where ``full`` expects none.
    """
    if mode not in TRAINED_MODES:
        raise UserError(f"mode is '{mode}', it must be one of {', '.join(TRAINED_MODES)}.")
    kind = MODES[mode]
    if (masks is not None) != kind.masked_base:
        raise UserError(f"Mode {mode} merges {'under' if kind.masked_base else 'without'} masks.")
    file = MdlFile(trained)
    own = strip_prefix(file.entries)
    factors = [name for name in own if name.endswith(".lora_A")]
    if bool(factors) != kind.lora:
        raise UserError(f"{trained} has {len(factors)} LoRA factors, which does not go with mode {mode}.")
    if factors and scaling is None:
        raise UserError(f"{trained} holds a LoRA: say its scaling (alpha / r).")
    by_name = {} if masks is None else ModelZooMasks(config, masks)
    expected = sorted({place.name for place in places(config).values()} & set(own)) + ["ln_f.weight"]
    progress.start("merge", len(expected), "tensors")
    with write_mdl(target) as writer:
        for name in (name for name in expected if name in own):
            writer.write(name, _merged(file, own, name, by_name.get(name), mode, scaling))
            progress.advance()
    progress.stop()
    return Path(target)


def _merged(
    file: MdlFile,
    own: Mapping[str, str],
    name: str,
    mask: torch.Tensor | None,
    mode: str,
    scaling: float | None,
) -> torch.Tensor:
    weight = file.read(own[name])
    if mask is not None:
        trained = own.get(f"{name}_mask")
        if trained is not None and not torch.equal(file.read(trained), mask):
            raise UserError(f"{file.path} was trained under another mask of {name}. Merge it with that mask set.")
        weight = weight.masked_fill(~mask, 0)
    module = name.removesuffix(".weight")
    if f"{module}.lora_A" not in own:
        return weight
    factor_a, factor_b = file.read(own[f"{module}.lora_A"]), file.read(own[f"{module}.lora_B"])
    return merged_weight(weight, factor_a, factor_b, scaling, mask if MODES[mode].masked_update else None)


def _by_place(where: Mapping[str, Place], source: Checkpoint) -> dict[str, list[str]]:
    """ModelZoo's names -> the source's tensors that go there, experts in order; fused experts under one name."""
    grouped: dict[str, list[str]] = {}
    for name in listed_names(source, where):
        grouped.setdefault(where[name].name, []).append(name)
    return grouped


def _gather(source: Checkpoint, where: Mapping[str, Place], names: list[str]) -> torch.Tensor:
    parts = [where[name].to_modelzoo(read_listed(source, name)) for name in names]
    return parts[0].contiguous() if where[names[0]].expert is None else torch.stack(parts, dim=1)
