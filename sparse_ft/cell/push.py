"""A cell's model on the Hugging Face hub: the checkpoint, its masks and its card, once it has been proved again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_ft.cell.rebuild import logged_cell, masks_of, not_of, rebuild
from sparse_ft.cell.register import cell_card
from sparse_ft.cell.result import CellResult
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.files import write_json, write_text
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.folder import is_packed
from sparse_ft.progress import Progress
from sparse_ft.pruning.output import MaskFile
from sparse_ft.settings.modes import MODES
from sparse_ft.tracking.models import resolve_model
from sparse_ft.tracking.record import Kind, Run, Tag
from sparse_ft.tracking.runs import Tracker
from sparse_ft.validation import Validation, validate_checkpoint

__all__ = ["Parcel", "pack", "upload"]


@dataclass(frozen=True)
class Parcel:
    """What goes to the hub.

    Attributes:
        run: whose model it is.
        files: path in the repository -> file here.
        validation: of the checkpoint against its masks.
    """

    run: Run
    files: Mapping[str, Path]
    validation: Validation


def pack(tracker: Tracker, run_id: str, to: str, scratch: Path, progress: Progress) -> Parcel:
    """The files of a cell's model, from the registry, from the study's folder, or made again from adapter and masks.

    Args:
        tracker: where the run is.
        run_id: of a FINISHED cell; one that is the ``same_as`` of another gives that one's model.
        to: the repository, for the card.
        scratch: folder for what has to be made or fetched.
        progress: told how far it is.

    Raises:
        UserError: no such cell, a mode that fills the zeros, or a model that is gone and cannot be made again.
    """
    run = tracker.run(run_id)
    run = tracker.run(run.same_as) if run.same_as else run
    if run.kind != Kind.CELL or not run.is_finished:
        raise UserError(f"run {run_id} is no finished cell ({run.status}); there is no model to push.")
    cell = logged_cell(tracker, run)
    if MODES[cell.mode].loses_zeros:
        raise UserError(f"run {run_id} is of mode {cell.mode}, whose merged model is dense: nothing in it is sparse.")
    folder = _checkpoint(tracker, run, scratch, progress)
    masks = masks_of(tracker, run, cell, scratch, weights=False)
    validation = validate_checkpoint(folder, _mask_set(masks, folder), progress=progress)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "README.md"}
    if masks is not None:
        files[f"masks/{masks.path.name}"] = masks.path
    files["validation.json"] = write_json(scratch / "validation.json", validation.to_dict())
    protocol = {k.removeprefix("protocol/"): v for k, v in run.params.items() if k.startswith("protocol/")}
    card = cell_card(cell, CellResult(metrics=run.metrics, protocol=protocol, tags=run.tags), hub=to)
    files["README.md"] = write_text(scratch / "README.md", card)
    return Parcel(run, files, validation)


def upload(parcel: Parcel, to: str, private: bool = True) -> str:
    """Puts the files into the repository, in one commit; makes it where there is none.

    Args:
        parcel: what `pack` made.
        to: ``owner/name``.
        private: of a repository that is made; one that is there already and public is then refused.

    Returns:
        The commit.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    api = HfApi()
    try:
        try:
            if private and not api.repo_info(to).private:
                raise UserError(f"{to} is on the hub and public; add --private false to push into it, or name another.")
        except RepositoryNotFoundError:
            api.create_repo(to, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in parcel.files.items()]
        return api.create_commit(to, operations, commit_message=f"{parcel.run.name} (run {parcel.run.run_id})").oid
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError("the hub is switched off (HF_HUB_OFFLINE); unset it to push.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        why = str(error).strip().splitlines()[0]
        login = "log in with a token that may write: hf auth login, or HF_TOKEN"
        advice = login if status in (401, 403) else "try again"
        raise UserError(f"the hub refuses {to} ({why}); {advice}.") from error
    except Exception as error:  # the client raises half a dozen classes for "no network"
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UserError(f"{to} could not be pushed ({why}); check the network and HF_ENDPOINT.") from error


def _checkpoint(tracker: Tracker, run: Run, scratch: Path, progress: Progress) -> Path:
    """A folder with the run's merged model, whose weights are those that it logged."""
    if registered := run.tags.get(Tag.REGISTERED_AS):
        folder = resolve_model(f"models:/{registered}", tracker.uri, scratch / "registered")
        if (problem := not_of(run, folder)) is not None:
            raise UserError(f"the registered model {registered} has been changed: {problem}.")
        return folder
    kept = run.tags.get(Tag.MODEL_FOLDER)
    if kept and os.path.isdir(kept) and not is_packed(kept) and not_of(run, Path(kept)) is None:
        return Path(kept)
    return rebuild(tracker, run.run_id, scratch / "rebuilt", Workbench(progress))


def _mask_set(masks: MaskFile | None, folder: Path) -> MaskSet:
    return MaskSet.all_kept(Checkpoint(folder).prunable_shapes()) if masks is None else masks.load()
