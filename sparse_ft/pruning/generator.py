"""The entry of the pruning engine: a checkpoint in, mask files of every level out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import sparse_ft
from sparse_ft.cores import cores
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.masks.histogram import exact_count
from sparse_ft.models.copying import copy_checkpoint
from sparse_ft.models.devices import resolve_device, resolve_dtype
from sparse_ft.models.families import architecture_of
from sparse_ft.models.names import role
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.progress import SILENT, Progress
from sparse_ft.pruning.coverage import coverage_report
from sparse_ft.pruning.expert_levels import check_levels
from sparse_ft.pruning.output import LevelFiles, MaskFile
from sparse_ft.pruning.rules import load
from sparse_ft.pruning.sources import KeySource, MagnitudeSource, RandomSource, ScoreSource
from sparse_ft.pruning.streaming import MaskSink, Pool, write_global, write_groups, write_layers, write_rows
from sparse_ft.pruning.structure import choose_units, families, family_scores, write_units
from sparse_ft.settings.field import part_of
from sparse_ft.settings.pruning import PruningSettings
from sparse_ft.settings.rules import ACTIVATIONS, EXPERTS, GRADIENTS, HESSIANS, MAGNITUDE, NOTHING, RANDOM, UNIFORM

# What looks at text computes with torch, and is imported where it is needed: magnitudes and random masks need none.
if TYPE_CHECKING:
    import torch

    from sparse_ft.models.blocks import BlockModel
    from sparse_ft.pruning.blockstate import BlockState
    from sparse_ft.pruning.calibration import Calibration
    from sparse_ft.pruning.importance import Statistics

__all__ = ["MaskGenerator"]

Counts = Mapping[str, Sequence[int | np.ndarray]]


class MaskGenerator:
    """Makes masks of one checkpoint.

    Args:
        checkpoint_folder: a Hugging Face folder with safetensors, one file or shards.
        settings: what to prune and how.
        calibration: text, where ``settings.needs_calibration``.
        model_name: as the masks' metadata should name the model; default: the folder's name.
        progress: told of every stage.

    Raises:
        UserError: settings that make no sense, a checkpoint that cannot be read or is of an unknown
            architecture, missing calibration data, or a pattern that the tensors' shapes do not fit. All of it
            before any weight is read.
    """

    def __init__(
        self,
        checkpoint_folder: str | Path,
        settings: PruningSettings,
        calibration: Calibration | None = None,
        model_name: str = "",
        progress: Progress = SILENT,
    ):
        settings.check()
        self.settings = settings
        self.checkpoint = open_checkpoint(checkpoint_folder)
        self.shapes = self.checkpoint.prunable_shapes()
        self.calibration = calibration
        self.model_name = model_name or self.checkpoint.folder.name
        self.progress = progress
        self.threads = settings.threads or cores()
        self.notes: list[str] = []
        self._finished: list[BlockState] = []
        self._measured: list[dict[str, Any]] = []  # of the blocks, by level, as the metadata say it
        self._check_inputs()

    def generate(
        self, output_dir: str | Path, file_format: str = "safetensors", figures: str = "summary"
    ) -> list[MaskFile]:
        """Writes the masks and statistics of every level, ``coverage.json``, and figures; see `LevelFiles.finish`.

        Returns:
            one entry per level, ascending.

        Raises:
            UserError: NaN or infinite weights (names the tensor), an unknown format.
        """
        folder = Path(output_dir)
        files = LevelFiles(folder, self.settings.label, self.settings.levels, self.shapes, file_format)
        self.notes, self._finished, self._measured = [], [], []
        try:
            checkpoints = self._write(files, folder)
            results = files.finish(lambda level: self._metadata(level, checkpoints[level]), checkpoints, figures)
        finally:
            files.abort()
        for state in self._finished:  # kept until the masks are: a run killed while writing loses no block
            state.remove()
        report = coverage_report(self.checkpoint)
        report["levels"] = [_level_coverage(result, report["parameters"]) for result in results]
        write_json(folder / "coverage.json", report)
        return results

    def _check_inputs(self) -> None:
        if self.settings.needs_calibration:
            if self.calibration is None:
                raise UserError(
                    f"importance {self.settings.rule.name}, allocation {self.settings.allocation}: calibration"
                    " text is needed. Name a task (and data_dir) to take it from."
                )
            self.calibration.check()
        if self.settings.method == EXPERTS:
            check_levels(self.checkpoint.config, self.settings.levels)
        if self.settings.method == "semi_structured":
            group = self.settings.m
            for name, shape in self.shapes.items():
                if shape[-1] % group:
                    raise UserError(
                        f"{name} has {shape[-1]} inputs, which groups of {group} do not divide. Take another pattern."
                    )

    def _write(self, files: LevelFiles, folder: Path) -> list[Path | None]:
        """Makes the masks; returns each level's pruned checkpoint, where the weights that stay are updated."""
        settings = self.settings
        if settings.method == EXPERTS:
            self._write_experts(files, folder)
            return [None] * len(settings.levels)
        if settings.rule.needs in (ACTIVATIONS, HESSIANS) and settings.scope != "global":
            return self._write_blockwise(files, folder)
        # What is bettered afterwards is written apart: masks on disk cannot be written twice.
        drafts = LevelFiles(folder, settings.label, settings.levels, self.shapes) if settings.refines else files
        try:
            with self._source(folder) as source:
                self._write_from(source, self._counts(folder), drafts)
            if settings.refines or settings.changes_weights:
                return self._write_blockwise(files, folder, given=drafts.packed)
        finally:
            if drafts is not files:
                drafts.abort()
        return [None] * len(settings.levels)

    def _write_from(self, source: KeySource, counts: Counts, sink: MaskSink) -> None:
        settings = self.settings
        common = {"threads": self.threads, "progress": self.progress}
        if settings.method == "structured":
            members = families(self.checkpoint.config, self.shapes)
            scores = family_scores(members, source, **common)
            write_units(members, choose_units(members, scores, settings.levels, settings.scope), self.shapes, sink)
        elif settings.method == "semi_structured":
            write_groups(source, settings.n, settings.m, sink, **common)
        elif settings.scope == "global":
            write_global(source, settings.levels, sink, **common)
        elif settings.scope == "layer":
            write_layers(source, counts, sink, **common)
        else:
            write_rows(source, counts, sink, **common)

    def _write_experts(self, sink: MaskSink, folder: Path) -> None:
        from sparse_ft.pruning.experts import choose_experts, expert_saliencies, write_experts

        self._check_finite()
        config, state = self.checkpoint.config, self._state(folder, "experts")
        contribution = load(self.settings.rule.function)
        saliencies = expert_saliencies(self._block_model(), self._tokens, contribution, state, self.progress)
        counts = [exact_count(level, architecture_of(config).experts.number(config)) for level in self.settings.levels]
        kept = [{block: choose_experts(values, k) for block, values in saliencies.items()} for k in counts]
        write_experts(config, kept, self.shapes, sink)
        self._finish_state(state)

    def _write_blockwise(
        self, files: LevelFiles, folder: Path, given: Callable[[int, str], np.ndarray] | None = None
    ) -> list[Path | None]:
        from sparse_ft.pruning.blockwise import BlockPruner

        self._check_finite()
        model = self._block_model()
        state = self._state(folder, "prune and measure")
        pruner = BlockPruner(model, self.settings, self._counts(folder) if given is None else {}, state, given)
        pruner.run(self._tokens, self.progress)
        levels = range(len(self.settings.levels))
        for level in levels if given is None or self.settings.refines else ():
            for block in range(model.count):
                for name, packed in pruner.packed(level, block).items():
                    files.append(level, name, packed)
        checkpoints: list[Path | None] = [None for _ in levels]
        self._measured = [pruner.measured(level) for level in levels]
        if self.settings.changes_weights:
            checkpoints = [
                copy_checkpoint(
                    self.checkpoint,
                    files.paths[level].model,
                    lambda name, tensor, level=level: (
                        pruner.weight(level, self._block(name), name) if name in self.shapes else tensor
                    ),
                    self.progress,
                )
                for level in levels
            ]
        self._finish_state(state)
        return checkpoints

    @contextmanager
    def _source(self, folder: Path) -> Iterator[KeySource]:
        """Scores of every weight, in whatever way the rule has them."""
        settings, rule = self.settings, self.settings.rule
        if rule is RANDOM:
            yield RandomSource(self.shapes, settings.seed)
        elif rule is MAGNITUDE:
            yield MagnitudeSource(self.checkpoint, list(self.shapes))
        elif rule.needs == NOTHING:
            from sparse_ft.pruning.importance import Statistics

            self._check_finite()
            yield ScoreSource(self.shapes, lambda name: self._score(name, Statistics(name)))
        elif rule.needs == GRADIENTS:
            self._check_finite()
            yield self._gradient_source()
        else:
            from sparse_ft.pruning.blockwise import dense_scores

            self._check_finite()
            state = self._state(folder, "scores")
            yield dense_scores(self._block_model(), self._tokens, load(rule.function), state, self.progress)
            self._finish_state(state)

    def _gradient_source(self) -> ScoreSource:
        from sparse_ft.pruning.gradients import gradient_statistics
        from sparse_ft.pruning.importance import Statistics

        settings = self.settings
        means = gradient_statistics(
            self.checkpoint.folder, self._tokens, settings.rule.sums, settings.dtype, settings.device, self.progress
        )

        def load(name: str) -> np.ndarray:
            about = Statistics(
                name,
                tokens=self._tokens.numel(),
                mean_abs_gradient=means["gradient"][name] if "gradient" in means else None,
                mean_abs_product=means["product"][name] if "product" in means else None,
            )
            return self._score(name, about)

        return ScoreSource(self.shapes, load)

    def _score(self, name: str, statistics: Statistics) -> np.ndarray:
        from sparse_ft.pruning.importance import score, with_floor

        weight = self.checkpoint.tensor(name)
        scores, floored = with_floor(score(load(self.settings.rule.function), weight, statistics), weight)
        if floored:
            self._note(f"{name}: scores were all zero; ordered by magnitude")
        return scores.contiguous().numpy()

    def _counts(self, folder: Path) -> Counts:
        """How many weights of each tensor (scope row: of each of its rows) every level prunes."""
        levels, rows = self.settings.levels, self.settings.scope == "row"
        if self.settings.allocating is UNIFORM:
            return {
                name: [exact_count(level, shape[-1] if rows else math.prod(shape)) for level in levels]
                for name, shape in self.shapes.items()
            }
        from sparse_ft.pruning.allocation import row_counts, tensor_counts

        shares = self._shares(folder)
        counts = tensor_counts(levels, {name: math.prod(shape) for name, shape in self.shapes.items()}, shares)
        if rows:  # each row rounded by itself would miss the whole
            return {n: [row_counts(k, math.prod(self.shapes[n][:-1])) for k in ks] for n, ks in counts.items()}
        return counts

    def _shares(self, folder: Path) -> dict[str, list[float]]:
        """The sparsity of each tensor at each level: that of its block."""
        from sparse_ft.pruning.allocation import sparsities_at
        from sparse_ft.pruning.blockwise import block_figures

        settings, allocating = self.settings, self.settings.allocating
        model, state = self._block_model(), self._state(folder, allocating.name)
        options = [getattr(settings, name) for name in allocating.options]
        figures = block_figures(
            model, self._tokens, lambda s: load(allocating.figure)(s, *options), state, self.progress
        )
        self._finish_state(state)
        deviations = load(allocating.deviations)(figures, getattr(settings, allocating.spread))
        sizes = [sum(math.prod(self.shapes[name]) for name in model.names(b)) for b in range(model.count)]
        by_level = [sparsities_at(level, deviations, sizes) for level in settings.levels]
        return {name: [float(values[self._block(name)]) for values in by_level] for name in self.shapes}

    def _block(self, name: str) -> int:
        return role(self.checkpoint.config, name).block

    def _check_finite(self) -> None:
        """Reads all weights once: a model with NaN gives scores that say nothing about where they are."""
        source = MagnitudeSource(self.checkpoint, list(self.shapes))

        def read(name: str) -> None:
            for _ in source.parts(name):
                pass

        tasks = {name: partial(read, name) for name in self.shapes}
        Pool(source, self.threads, self.progress).run("check weights", tasks)

    @property
    def _tokens(self) -> torch.Tensor:
        assert self.calibration is not None  # seen to in _check_inputs
        return self.calibration.token_ids

    def _block_model(self) -> BlockModel:
        from sparse_ft.models.blocks import BlockModel

        device = resolve_device(self.settings.device)
        return BlockModel(self.checkpoint, resolve_dtype(self.settings.dtype, device), device)

    def _state(self, folder: Path, purpose: str) -> BlockState:
        from sparse_ft.pruning.blockstate import BlockState

        settings = {
            key: value
            for key, value in part_of(PruningSettings, self.settings).items()
            if key not in ("threads", "force", "importance", "device")
        }
        identity = {
            "purpose": purpose,
            "settings": settings | {"importance": self.settings.rule.name},
            "fingerprint": self.checkpoint.fingerprint,
            "tokens": hashlib.sha256(self._tokens.numpy().tobytes()).hexdigest(),
            "version": sparse_ft.__version__,
        }
        return BlockState(folder, identity)

    def _finish_state(self, state: BlockState) -> None:
        for note in state.notes:
            self._note(note)
        self._finished.append(state)

    def _note(self, text: str) -> None:
        """Says a remark on the run, once, and keeps it for the metadata."""
        if text not in self.notes:
            self.notes.append(text)
            self.progress.say(text)

    def _metadata(self, level: int, checkpoint: Path | None) -> dict[str, Any]:
        settings = self.settings
        about: dict[str, Any] = {
            "method": settings.method,
            "importance": settings.rule.name,
            "scope": settings.scope,
            "sparsity": settings.levels[level],
            "model": self.model_name,
            "fingerprint": self.checkpoint.fingerprint,
            "calibration": None,
            "seed": settings.seed,
            "version": sparse_ft.__version__,
        }
        if settings.needs_calibration and self.calibration is not None:
            samples, length = self.calibration.token_ids.shape
            about["calibration"] = {"samples": samples, "length": length, **self.calibration.description}
        if settings.method == "semi_structured":
            about["pattern"] = f"{settings.n}:{settings.m}"
        if settings.allocating is not UNIFORM:
            about["allocation"] = settings.allocation
        about |= settings.steps
        if self._measured:
            about |= self._measured[level]
        if checkpoint is not None:  # the masks belong to the updated weights
            about["source_fingerprint"] = about["fingerprint"]
            about["fingerprint"] = open_checkpoint(checkpoint).fingerprint
        if len(settings.levels) > 1:
            about["levels"] = list(settings.levels)
        if self.notes:
            about["notes"] = self.notes[:20]
        return about


def _level_coverage(result: MaskFile, parameters: int) -> dict[str, Any]:
    return {
        "sparsity": result.sparsity,
        "achieved": result.achieved,
        "pruned": result.pruned,
        "pruned_fraction_of_all_parameters": result.pruned / parameters if parameters else 0.0,
        "checksum": result.checksum,
    }
