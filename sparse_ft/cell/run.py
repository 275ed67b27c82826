"""One cell: masks on, fine-tune, merge, save, prove, score. Plain results; nothing is logged here."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, TrainerCallback

from sparse_ft.cell.failures import ValidationFailedError
from sparse_ft.cell.identity import cell_identity, untuned_key
from sparse_ft.cell.masks import foreign_masks
from sparse_ft.cell.merge_cost import NO_WEIGHT_MOVED, merge_warning, weights_moved
from sparse_ft.cell.settings import check_cell, count, evaluation_settings, lora_settings, training_settings
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.evaluation import Evaluation, answer_loss, evaluate
from sparse_ft.files import write_json, write_text
from sparse_ft.lora.merge import merge_all_lora_weights
from sparse_ft.lora.model import apply_sparse_lora, remask, validate_sparsity_preserved
from sparse_ft.masks.checks import check_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_state_into, save_model, saved_tokenizer
from sparse_ft.progress import Progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.modes import MODES
from sparse_ft.tasks.examples import training_examples
from sparse_ft.training import TrainingResult, train
from sparse_ft.validation import Validation, validate_checkpoint

__all__ = ["CellResult", "Judge", "StoppedEarly", "run_cell"]


@dataclass
class CellResult:
    """What a cell measured. A metric that was not measured is absent.

    Attributes:
        metrics: by their names in MLflow.
        protocol: how accuracy, perplexity and throughput were measured.
        series: metric -> [(step, value)].
        tags: what identifies the inputs, and warnings.
        artifacts: (file or folder, folder among the run's artifacts).
        merged: the merged checkpoint, where it was kept.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[tuple[Path, str]] = field(default_factory=list)
    merged: Path | None = None

    def warn(self, text: str) -> None:
        """Adds to the tag ``warning``."""
        self.tags["warning"] = "; ".join(filter(None, [self.tags.get("warning"), text]))


def run_cell(
    cell: CellConfig,
    mask_file: MaskFile | None,
    bench: Workbench,
    folder: Path,
    judge: Judge | None = None,
    name: str = "",
    warn_foreign: bool = False,
) -> CellResult:
    """Runs a cell on this machine.

    Args:
        cell: what to run.
        mask_file: its masks; None for a dense cell. Where they come with a checkpoint of their own (SparseGPT
            updates the weights it keeps), training starts from that.
        bench: keeps the base model between cells.
        folder: the cell's own folder; what ``cell.keep`` names stays there.
        judge: of a search: decides at some steps whether the cell goes on, from the loss on the task's answers.
        name: of its run, for the cells that take over what this one measured; by default the cell's title.
        warn_foreign: take masks that were made of other weights of these shapes, with a warning; in a study they
            are refused.

    Raises:
        StoppedEarly: the judge has seen enough.
        UserError: anything the user can put right: model, data, masks that do not fit.
        NonFiniteLossError: training diverged.
        ValidationFailedError: the merged checkpoint breaks what the mode promises.
    """
    result, clock, mode = CellResult(), _Clock(), MODES[cell.mode]
    folder.mkdir(parents=True, exist_ok=True)
    with clock("load"):
        check_cell(cell)
        settings = training_settings(cell)
        checkpoint, tokenizer = bench.checkpoint(cell.model), bench.tokenizer(cell.model)
        result.tags.update(bench.identity(cell.model))
        task = bench.task(cell.task, cell.data_dir, count(cell.num_fewshot))
        start = checkpoint if mask_file is None or mask_file.checkpoint is None else Checkpoint(mask_file.checkpoint)
        masks = _masks(mask_file, start, checkpoint, warn_foreign, result)
        examples = training_examples(task, tokenizer, cell.max_seq_len, settings.examples_needed, cell.seed)
    scores = _Scores(cell, name or cell.title, bench, tokenizer, task, folder)

    with clock("load"), bench.borrow(cell) as model:
        if start is not checkpoint:
            load_state_into(model, start, start.prunable)
        if masks is not None:
            apply_masks(model, masks)
        if cell.score_untuned:
            with clock("eval_untuned"):
                _log_untuned(result, scores, model, start, masks)
        with clock("train"):
            torch.manual_seed(cell.seed)
            adapted = apply_sparse_lora(model, lora_settings(cell), cell.mode, masks, cell.seed)
            rungs = _Rungs(judge, adapted, scores, clock) if judge is not None and judge.rungs else None
            trained = train(
                adapted,
                examples,
                settings,
                folder / "trainer",
                tokenizer.pad_token_id,
                progress=bench.progress,
                callbacks=[rungs] if rungs else [],
            )
        _log_training(result, trained, timed=rungs is None)
        if rungs is not None:
            result.series["eval/loss_while_training"] = rungs.losses
        if cell.keep != "none" and mode.lora:
            adapted.save_pretrained(folder / "adapter")
            result.artifacts.append((folder / "adapter", "adapter"))
        base_violations = 0
        if mode.loses_zeros:
            with adapted.disable_adapter():  # what this mode keeps sparse is the base under the adapter
                base_violations = sum(validate_sparsity_preserved(adapted, masks).values())
        with clock("eval_adapter"):
            # Of the other modes the trained model is the merged one, bit for bit: it is scored below.
            before = None if mode.masked_update else scores.answers(adapted)
        with clock("merge"):
            merged = merge_all_lora_weights(adapted, cell.rounding, cell.seed)
            del adapted
            targets = lora_settings(cell).target_modules if mode.lora else None
            moved = weights_moved(merged, start, masks, targets)
            result.metrics["train/weights_moved"] = moved
            if moved == 0:
                result.warn(f"{NO_WEIGHT_MOVED}: training changed no weight; the scores are those of the untuned model")
        with clock("save"):
            target = save_model(merged, saved_tokenizer(checkpoint.folder), folder / "merged")
            result.tags["merged_fingerprint"] = Checkpoint(target).fingerprint
        with clock("validate"):
            obeyed = MaskSet.all_kept(checkpoint.prunable_shapes()) if masks is None else masks
            validation = validate_checkpoint(
                target,
                obeyed,
                base=start.folder if mode.lora else None,
                target_modules=lora_settings(cell).target_modules,
                progress=bench.progress,
            )
            _log_validation(result, cell, validation, base_violations, folder)
        with clock("eval"):
            scored = scores(merged, "score")
            _log_scores(result, scored.metrics, "")
            _log_merge(result, before, scored.metrics)
            result.protocol.update(scores.protocol)
        if masks is not None and masks.n_pruned == 0 and mode.lora:
            # Nothing is masked, so the re-masked model is the merged one, bit for bit. In both modes, for at 0 %
            # one of them runs for both.
            _log_scores(result, scored.metrics, "_remasked")
        elif mode.loses_zeros:
            with clock("eval_remasked"):
                remask(merged, masks)
                _log_scores(result, scores(merged, "score re-masked").metrics, "_remasked")
    if cell.keep == "all" or cell.register_as != "none":
        result.merged = target
    else:
        shutil.rmtree(target)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    if cell.keep_samples:
        result.artifacts += [(file, "samples") for file in scores.written]
    result.metrics.update(clock.metrics())
    return result


class Judge(Protocol):
    """Decides at some steps of a training whether it goes on. ``rungs``: after which steps it is asked."""

    rungs: Collection[int]

    def __call__(self, step: int, loss: float) -> bool:
        """Takes the loss on the task's answers; True: stop."""


class StoppedEarly(Exception):
    """A judge has stopped the training; ``losses`` are the (step, loss) that it saw."""

    def __init__(self, losses: list[tuple[int, float]]):
        super().__init__(f"stopped at step {losses[-1][0]} with an evaluation loss of {losses[-1][1]:.4f}")
        self.losses = losses


class _Scores:
    """Scores a model as the cell asks."""

    def __init__(self, cell: CellConfig, name: str, bench: Workbench, tokenizer, task, folder: Path):
        self._cell, self._name, self._bench, self._tokenizer, self._task = cell, name, bench, tokenizer, task
        self._samples = folder / "samples"
        self._settings = evaluation_settings(cell)
        self.protocol: dict[str, Any] = {}
        self.written: list[Path] = []  # the folder may hold an earlier cell's

    def __call__(self, model: torch.nn.Module, stage: str, **changes: Any) -> Evaluation:
        progress = _Staged(self._bench.progress, stage)
        evaluation = evaluate(model, self._tokenizer, self._task, replace(self._settings, **changes), progress)
        self.protocol = evaluation.protocol
        if evaluation.samples:
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
            self.written.append(write_text(self._samples / f"{stage.replace(' ', '_')}.jsonl", "".join(lines)))
        return evaluation

    def answers(self, model: torch.nn.Module) -> dict[str, float]:
        """The loss on the right answers alone."""
        progress = _Staged(self._bench.progress, "score adapter")
        return answer_loss(model, self._tokenizer, self._task, self._settings, progress)

    def untuned(self, model: PreTrainedModel, start: Checkpoint, checksum: str) -> tuple[str, Evaluation]:
        identity = cell_identity(self._cell, self._bench)
        key = untuned_key(self._cell, identity, start.fingerprint, checksum, asdict(self._settings))
        return self._bench.untuned(key, self._name, lambda: self(model, "score untuned"))


class _Rungs(TrainerCallback):
    """Scores the model in the middle of its training, and stops where the judge says so."""

    def __init__(self, judge: Judge, model: torch.nn.Module, scores: _Scores, clock: _Clock):
        self._judge, self._model, self._scores, self._clock = judge, model, scores, clock
        self.losses: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step not in self._judge.rungs:
            return
        with self._clock("eval"):  # the scorer puts the model back into training mode
            loss = self._scores(self._model, f"score at step {step}", perplexity_tokens=0).metrics["loss"]
        self.losses.append((step, loss))
        if self._judge(step, loss):
            raise StoppedEarly(self.losses)


class _Staged(Progress):
    """Names the stages of a part after what the cell is doing with it."""

    def __init__(self, progress: Progress, stage: str):
        self._progress, self._stage = progress, stage

    def start(self, stage: str, total: float, unit: str = "") -> None:
        self._progress.start(f"{self._stage}: {stage}", total, unit)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._progress.advance(amount, note)

    def stop(self) -> None:
        self._progress.stop()


class _Clock:
    """Seconds per stage, each stage without the stages inside it, and the total."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent

    def metrics(self) -> dict[str, float]:
        total = time.perf_counter() - self._began
        return {**{f"time/{stage}_seconds": s for stage, s in self._seconds.items()}, "time/total_seconds": total}


def _masks(
    file: MaskFile | None, start: Checkpoint, base: Checkpoint, foreign: bool, result: CellResult
) -> MaskSet | None:
    """The cell's masks, which fit the weights ``start`` that they come with, made of the model ``base``."""
    if file is None:
        return None
    masks = file.load()
    check_masks(masks, start.prunable_shapes(), str(start.folder.name))
    result.tags["mask_checksum"] = masks.checksum
    if problem := foreign_masks(file, start, base):
        if not foreign:
            raise UserError(f"{problem}; a study compares only masks of its own models.")
        result.warn(problem)
    result.metrics.update({"sparsity/target": file.sparsity, "sparsity/achieved": masks.sparsity})
    return masks


def _log_untuned(
    result: CellResult, scores: _Scores, model: PreTrainedModel, start: Checkpoint, masks: MaskSet | None
) -> None:
    pruned = masks is not None and masks.n_pruned > 0  # masks that keep all leave the model as it is
    measured_by, evaluation = scores.untuned(model, start, masks.checksum if pruned else "")
    result.tags["untuned_measured_by"] = measured_by
    _log_scores(result, evaluation.metrics, "_untuned")


def _log_scores(result: CellResult, metrics: dict[str, float], suffix: str) -> None:
    result.metrics.update({f"eval/{name}{suffix}": value for name, value in metrics.items()})


def _log_merge(result: CellResult, adapter: dict[str, float] | None, merged: dict[str, float]) -> None:
    """The loss with the adapter, beside the merged model's; a warning where the merge costs more than its error."""
    if adapter is None:
        adapter = {name: merged[name] for name in ("loss", "loss_stderr") if name in merged}
    _log_scores(result, adapter, "_adapter")
    if said := merge_warning(adapter, merged):
        result.warn(said)


def _log_training(result: CellResult, trained: TrainingResult, timed: bool) -> None:
    measured = {"train/loss": trained.loss, "memory/peak_bytes": trained.peak_bytes}
    if timed:  # nobody scored in between
        measured["train/tokens_per_second"] = trained.tokens_per_second
        measured["train/samples_per_second"] = trained.samples_per_second
    result.metrics.update({name: value for name, value in measured.items() if value is not None})
    result.series["train/loss_curve"] = trained.loss_curve
    result.protocol.update({f"train_{name}": value for name, value in trained.protocol.items()})
    result.protocol["train_untimed_steps"] = trained.warmup_steps_untimed


def _log_validation(
    result: CellResult, cell: CellConfig, validation: Validation, base_violations: int, folder: Path
) -> None:
    """Violations are weights that break the mode's promise: masked weights that are not zero in the merged
    checkpoint, or, of sparse_to_dense, in the base under the adapter (its merged model is dense by design)."""
    mode = MODES[cell.mode]
    violations = base_violations if mode.loses_zeros else validation.violations
    result.metrics["sparsity/violations"] = violations
    result.metrics["sparsity/after_merge"] = validation.sparsity
    if not mode.masked_base:
        result.metrics.update({"sparsity/target": 0.0, "sparsity/achieved": 0.0})
    result.artifacts.append((write_json(folder / "validation.json", validation.to_dict()), "validation"))
    problems = [] if mode.loses_zeros else list(validation.problems)
    if violations or problems:
        what = f"{violations} masked weights are not zero" if violations else problems[0]
        raise ValidationFailedError(f"{what}; see validation.json")
