"""What a mode promises of its zeros, held against the merged checkpoint."""

from __future__ import annotations

from sparse_ft.cell.failures import ValidationFailedError
from sparse_ft.cell.training import Trained, Training
from sparse_ft.files import write_json
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.settings.modes import MODES
from sparse_ft.validation import validate_checkpoint

__all__ = ["check_promise"]


def check_promise(training: Training, trained: Trained) -> None:
    """Counts the weights that break the mode's promise, and adds the validation to the result.

    They are masked weights that are not zero in the merged checkpoint, or, of sparse_to_dense, in the base under the
    adapter (its merged model is dense by design).

    Raises:
        ValidationFailedError: the promise is broken, or a tensor changed that was not trained.
    """
    cell, start, result = training.cell, training.start, training.result
    masks = training.masks if training.whole is None else training.whole
    mode = MODES[cell.mode]
    validation = validate_checkpoint(
        training.target,
        MaskSet.all_kept(start.prunable_shapes()) if masks is None else masks,
        base=None if mode.trains_weights else start.folder,
        target_modules=cell.target_modules if mode.trains else (),
        progress=training.progress,
    )
    violations = trained.base_violations if mode.loses_zeros else validation.violations
    result.metrics["sparsity/violations"] = violations
    result.metrics["sparsity/after_merge"] = validation.sparsity
    if not mode.masked_base:
        result.metrics.update({"sparsity/target": 0.0, "sparsity/achieved": 0.0})
    report = write_json(training.folder / "validation.json", validation.to_dict())
    result.artifacts.append((report, "validation"))
    problems = [] if mode.loses_zeros else list(validation.problems)
    if violations or problems:
        what = f"{violations} masked weights are not zero" if violations else problems[0]
        raise ValidationFailedError(f"{what}; see validation.json")
