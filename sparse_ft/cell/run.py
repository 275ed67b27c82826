"""The life of a cell: masks on, score, recover, train, merge, prove, score. Plain results; nothing is logged here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from sparse_ft.cell.clock import Clock
from sparse_ft.cell.group_model import GroupModel
from sparse_ft.cell.masks import foreign_masks
from sparse_ft.cell.measure import measure_forms
from sparse_ft.cell.merge_cost import NO_WEIGHT_MOVED, merge_warning, weights_moved
from sparse_ft.cell.promise import check_promise
from sparse_ft.cell.recovery import recover
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.scores import Scores
from sparse_ft.cell.start import Start, starting
from sparse_ft.cell.teacher import find_teacher
from sparse_ft.cell.trainer import LOCAL, UNTRAINED
from sparse_ft.cell.training import UNWATCHED, Trained, Trainer, Training, Watch
from sparse_ft.cell.training_set import training_set
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import write_json
from sparse_ft.lora.model import remask
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import apply_masks, load_state_into
from sparse_ft.models.packing import pack_checkpoint
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MeasureSettings
from sparse_ft.settings.modes import MODES
from sparse_ft.tracking.record import Tag

__all__ = ["run_cell"]


def run_cell(
    cell: CellConfig,
    mask_file: MaskFile | None,
    bench: Workbench,
    folder: Path,
    trainer: Trainer = LOCAL,
    watch: Watch = UNWATCHED,
    name: str = "",
    warn_foreign: bool = False,
    tuned: str = "",
) -> CellResult:
    """Runs a cell on this machine, but for what its trainer does elsewhere.

    Args:
        cell: what to run.
        mask_file: its masks; None for a dense cell. Where they come with a checkpoint of their own (SparseGPT
            updates the weights it keeps), training starts from that.
        bench: keeps the base model between cells.
        folder: the cell's own folder; what ``cell.keep`` names stays there.
        trainer: who trains and merges, where the mode trains anything.
        watch: who follows the training, and may stop it.
        name: of its run, for the cells that take over what this one measured; by default the cell's title.
        warn_foreign: take masks that were made of other weights of these shapes, with a warning; in a study they
            are refused.
        tuned: the run of the study's dense baseline, where that teaches.

    Raises:
        StoppedEarly: the judge has seen enough.
        UserError: anything the user can put right: model, data, masks that do not fit, what the trainer lacks.
        NonFiniteLossError: training diverged.
        TrainerError: a Cerebras training failed, with the class of the failure.
        ValidationFailedError: the merged checkpoint breaks what the mode promises.
    """
    with ExitStack() as temporary:
        return _run(cell, mask_file, bench, folder, trainer, watch, name, warn_foreign, tuned, temporary)


def _run(
    cell: CellConfig,
    mask_file: MaskFile | None,
    bench: Workbench,
    folder: Path,
    trainer: Trainer,
    watch: Watch,
    name: str,
    warn_foreign: bool,
    tuned: str,
    temporary: ExitStack,
) -> CellResult:
    result, clock, mode = CellResult(), Clock(), MODES[cell.mode]
    trainer = trainer if mode.trains else UNTRAINED
    folder.mkdir(parents=True, exist_ok=True)
    with clock("load"):
        cell.check()
        if missing := trainer.missing():
            raise UserError(" | ".join(missing))
        checkpoint, tokenizer = bench.checkpoint(cell.model), bench.tokenizer(cell.model)
        trainer.check(cell, checkpoint)
        result.tags.update(bench.identity(cell.model))
        task = bench.task(cell)
        begun = temporary.enter_context(starting(mask_file, checkpoint, folder, bench.progress))
        start, masks = begun.checkpoint, begun.masks
        teacher = find_teacher(cell, bench, folder, tuned)
        if teacher is not None and teacher is not checkpoint:
            result.tags[Tag.TEACHER_FINGERPRINT] = teacher.fingerprint
        if mask_file is not None:
            _log_masks(mask_file, begun, checkpoint, warn_foreign, result)
        examples = []
        if mode.trains:
            trained_on = training_set(cell, bench)
            examples = trained_on.examples
            result.protocol.update({f"train_{name}": value for name, value in trained_on.protocol.items()})
    scores = Scores(cell, name or cell.title, bench, tokenizer, task, folder)

    with clock("load"), _lent(cell, bench, begun, mask_file) as model:
        pruned = masks is not None and masks.n_pruned > 0  # masks that keep all leave the model as it is
        if cell.score_untuned or not mode.trains:
            with clock("eval_untuned" if mode.trains else "eval"):
                if mode.trains or not cell.keep_samples:
                    measured_by, untuned = scores.untuned(model, start, masks.checksum if pruned else "")
                else:
                    measured_by, untuned = scores.name, scores(model, "score")
                result.tags[Tag.UNTUNED_MEASURED_BY] = measured_by
                if mode.trains:
                    result.add_scores(untuned.metrics, "_untuned")
                else:
                    result.add_scores(_own(untuned.metrics, bool(scores.protocol)))
                    result.protocol.update(untuned.protocol)

        if cell.recovered:
            start = recover(cell, bench, model, begun, folder, clock, result, name or cell.title, teacher)
            if cell.score_untuned:
                with clock("eval_recovered"):
                    result.add_scores(scores.untuned(model, start, masks.checksum)[1].metrics, "_recovered")

        training = Training(
            cell=cell, model=model, base=checkpoint, start=start, masks=masks, examples=examples, tokenizer=tokenizer,
            folder=folder, scores=scores, clock=clock, result=result, progress=bench.progress, watch=watch,
            whole=begun.whole, teacher=None if cell.recovered else teacher,
        )  # fmt: skip
        trained = trainer.train(training)
        if mode.trains:
            with clock("merge"):
                targets = cell.target_modules if mode.lora else None
                merged = Checkpoint(training.target) if isinstance(trained.model, GroupModel) else trained.model
                moved = weights_moved(merged, start, masks, targets)
                result.metrics["train/weights_moved"] = moved
                if moved == 0:
                    result.warn(
                        f"{NO_WEIGHT_MOVED}: training changed no weight; the scores are those of the untuned model"
                    )
        with clock("save"):
            result.tags[Tag.MERGED_FINGERPRINT] = Checkpoint(training.target).fingerprint
        with clock("validate"):
            check_promise(training, trained)

        if mode.trains:
            with clock("eval"):
                scored = scores(trained.model, "score").metrics
                result.add_scores(scored)
                _log_merge(result, trained, scored)
                result.protocol.update(scores.protocol)
        if cell.measure:
            with clock("measure"):
                _measure(cell, training, trained, result)
        if masks is not None and masks.n_pruned == 0 and mode.lora:
            # Nothing is masked, so the re-masked model is the merged one, bit for bit. In both modes, for at 0 %
            # one of them runs for both.
            result.add_scores(scored, "_remasked")
        elif mode.loses_zeros:
            with clock("eval_remasked"):
                if isinstance(trained.model, GroupModel):
                    trained.model.group.do("remask")
                else:
                    remask(trained.model, masks)
                result.add_scores(scores(trained.model, "score re-masked").metrics, "_remasked")
    if cell.keep == "all" or cell.register_as is not None:
        result.merged = training.target
        if cell.keep_format == "packed" and cell.register_as is None:
            with clock("save"):
                _pack(training.target, cell, masks, result)
    else:
        shutil.rmtree(training.target)
    result.artifacts += scores.written
    result.tables |= scores.tables
    result.metrics.update(clock.metrics())
    return result


@contextmanager
def _lent(
    cell: CellConfig, bench: Workbench, begun: Start, file: MaskFile | None
) -> Iterator[PreTrainedModel | GroupModel]:
    """The model that the cell begins with, under its masks; to be changed at will inside the block."""
    if cell.gpus_per_cell > 1:
        from sparse_ft.cell.group.leader import lent_by_group

        bench.check_unchanged(cell.model)
        bench.release()
        with lent_by_group(cell, bench, begun, file) as model:
            yield model
        return
    start = begun.checkpoint
    with bench.borrow(cell, start if begun.smaller else None) as model:
        if start is not bench.checkpoint(cell.model) and not begun.smaller:
            load_state_into(model, start, start.prunable)
        if begun.masks is not None:
            apply_masks(model, begun.masks)
        yield model


def _log_masks(file: MaskFile, begun: Start, base: Checkpoint, foreign: bool, result: CellResult) -> None:
    """What a result says of its masks, which were made of the cell's model, or of the weights that they come with."""
    result.tags[Tag.MASK_CHECKSUM] = file.checksum
    if problem := foreign_masks(file, base if file.checkpoint is None else Checkpoint(file.checkpoint), base):
        if not foreign:
            raise UserError(f"{problem}; a study compares only masks of its own models.")
        result.warn(problem)
    result.metrics.update({"sparsity/target": file.sparsity, "sparsity/achieved": begun.whole.sparsity})


def _measure(cell: CellConfig, training: Training, trained: Trained, result: CellResult) -> None:
    """What the merged model's forms take, and how fast they are; of a model that is dense, that one's."""
    masks = training.masks if MODES[cell.mode].keeps_zeros else None
    masks = None if masks is None or not masks.n_pruned else masks
    settings = MeasureSettings(dtype=cell.dtype, device=cell.device)
    if (longest := training.base.config.get("max_position_embeddings")) is not None:
        prompt = min(settings.prompt_tokens, max(1, longest - settings.new_tokens))
        settings = replace(settings, prompt_tokens=prompt)
    scratch, report = training.folder / "measured", training.folder / "measure.json"
    scratch.mkdir(exist_ok=True)
    try:
        found = measure_forms(training.target, masks, settings, scratch, training.progress, trained.model)
    finally:
        shutil.rmtree(scratch)
    result.metrics.update(found.metrics())
    result.protocol.update({f"measure_{name}": value for name, value in found.protocol.items()})
    write_json(report, {"forms": [asdict(f) for f in found.forms], "absent": found.absent, "protocol": found.protocol})
    result.artifacts.append((report, "measure"))


def _pack(folder: Path, cell: CellConfig, masks: MaskSet | None, result: CellResult) -> None:
    """Packs the merged checkpoint where it lies; one that lost its zeros stays plain."""
    if masks is None or not masks.n_pruned or not MODES[cell.mode].keeps_zeros:
        return
    try:
        pack_checkpoint(folder, masks, folder, in_place=True)
    except UserError as error:
        result.warn(f"the merged checkpoint is kept plain: {error}")


def _own(metrics: Mapping[str, float], measured: bool) -> dict[str, float]:
    """Scores without speeds where another cell measured them."""
    return {name: value for name, value in metrics.items() if measured or not name.endswith("_per_second")}


def _log_merge(result: CellResult, trained: Trained, merged: Mapping[str, float]) -> None:
    """The loss before the merge, beside the merged model's; a warning where the merge costs more than its error."""
    before = trained.adapter
    if trained.exact:
        before = {name: merged[name] for name in ("loss", "loss_stderr") if name in merged}
    if before is None:
        return
    result.add_scores(before, "_adapter")
    if said := merge_warning(before, merged):
        result.warn(said)
