"""What a worker keeps between cells: the base model, the tasks, and scores that several cells share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sparse_ft.errors import DataMissingError, ModelUnavailableError, UserError
from sparse_ft.files import write_text
from sparse_ft.masks.files import load_masks
from sparse_ft.models.catalog import hub_commit, locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.devices import resolve_device, resolve_dtype
from sparse_ft.models.opening import open_checkpoint
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.model import DataSettings
from sparse_ft.settings.modes import MODES
from sparse_ft.tracking.record import Tag

# What loads models, tokenizers and tasks is imported with the first of them: masks by weight alone need none.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparse_ft.cell.group.launch import Launch
    from sparse_ft.cell.group.leader import Group
    from sparse_ft.evaluation import Evaluation
    from sparse_ft.tasks.corpora import CorpusRows
    from sparse_ft.tasks.rows import Rows
    from sparse_ft.tasks.suite import ScoredTask

__all__ = ["Workbench"]

# Of config.json what says nothing of the model: where it lay, and who wrote it.
_INCIDENTAL = ("_name_or_path", "transformers_version")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model")


class Workbench:
    """Loads models and tasks once. One base model is in memory at a time.

    A cell borrows the base model, prunes and trains it in place, and gives it back; before the next cell
    borrows it, what changed is copied back from the checkpoint, which is a hundred times faster than a load.

    Args:
        progress: told about loads.
        shared: folder in which several workers share the scores of untuned models; None keeps them here.

    Attributes:
        store: the tracking store of a study's worker; None: that of the surroundings.
        group: the processes that run cells with this one, where one did; see `sparse_ft.cell.group.leader.group_of`.
        launch: starts such processes; None: on this machine.
    """

    def __init__(self, progress: Progress = SILENT, shared: Path | None = None):
        self.progress = progress
        self._shared = shared
        self.store: str | None = None
        self.group: Group | None = None
        self.launch: Launch | None = None
        self._checkpoints: dict[str, Checkpoint] = {}
        self._stamps: dict[str, list[tuple[int, ...]]] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._tasks: dict[tuple[Any, ...], Any] = {}
        self._untuned: dict[str, tuple[str, Evaluation]] = {}
        self._digests: dict[str, dict[str, str]] = {}
        self._data: dict[tuple[Any, ...], dict[str, str]] = {}
        self._rows: dict[tuple[str, str | None], Rows] = {}
        self._given: dict[str, str] = {}
        self._corpora: dict[tuple[str, str | None], CorpusRows] = {}
        self._suites: dict[tuple[Any, ...], tuple[ScoredTask, ...]] = {}
        self._suite_digests: dict[tuple[Any, ...], str] = {}
        self._base: tuple[tuple[Any, ...], PreTrainedModel] | None = None
        self._changed: str | None = None  # None: pristine; "prunable" or "all": to be restored

    def checkpoint(self, name: str) -> Checkpoint:
        """The model's checkpoint folder, fetched if need be.

        Raises:
            ModelUnavailableError: it cannot be had.
        """
        if name not in self._checkpoints:
            try:
                checkpoint = open_checkpoint(locate(name, self.progress))
                checkpoint.check()  # whole and plain, before anything is made of it
                self._checkpoints[name] = checkpoint
                self._stamps[name] = _stamps(checkpoint)
            except UserError as error:
                raise ModelUnavailableError(str(error)) from error
        return self._checkpoints[name]

    def identity(self, name: str) -> dict[str, str]:
        """Tags that tell this model's weights from others of the same name: a hub's may change under it."""
        checkpoint = self.checkpoint(name)
        commit = hub_commit(checkpoint.folder)
        return {Tag.BASE_FINGERPRINT: checkpoint.fingerprint} | ({Tag.HUB_COMMIT: commit} if commit else {})

    def model_digests(self, name: str) -> dict[str, str]:
        """16 hex digits each for the model's ``weights``, its ``model_config`` and its ``tokenizer``'s files."""
        if name not in self._digests:
            checkpoint = self.checkpoint(name)
            config = {key: value for key, value in checkpoint.config.items() if key not in _INCIDENTAL}
            files = hashlib.sha256()
            folder = checkpoint.folder if checkpoint.folder.is_dir() else checkpoint.folder.parent
            for path in sorted(path for pattern in _TOKENIZER for path in folder.glob(pattern)):
                files.update(path.name.encode() + b"\n" + hashlib.sha256(path.read_bytes()).digest())
            self._digests[name] = {
                "weights": checkpoint.fingerprint,
                "model_config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
                "tokenizer": files.hexdigest()[:16],
            }
        return self._digests[name]

    def data_digests(self, settings: DataSettings) -> dict[str, str]:
        """See `sparse_ft.tasks.digests.data_digests`."""
        from sparse_ft.tasks.digests import data_digests

        key = _task_key(settings)
        if key not in self._data:
            self._data[key] = data_digests(self.task(settings))
        return self._data[key]

    @property
    def recovered(self) -> Path | None:
        """The folder in which workers share recovered models; None: each keeps its own."""
        return self._shared and self._shared.parent / "recovered"

    @property
    def teachers(self) -> Path | None:
        """The folder in which workers share the models of runs that teach; None: each keeps its own."""
        return self._shared and self._shared.parent / "teachers"

    def corpus(self, name: str, data_dir: str | None) -> CorpusRows:
        """The rows of a corpus, or of a file.

        Raises:
            DataMissingError: it cannot be had.
        """
        from sparse_ft.tasks.corpora import training_rows

        key = name, data_dir
        if key not in self._corpora:
            try:
                self._corpora[key] = training_rows(*key)
            except UserError as error:
                raise DataMissingError(str(error)) from error
        return self._corpora[key]

    def rows(self, source: str, data_dir: str | None) -> Rows:
        """The rows of ``train_data``, all of them looked at.

        Raises:
            DataMissingError: they cannot be had, or nothing can be learned from one.
        """
        from sparse_ft.tasks.rows import read_rows

        key = source, data_dir
        if key not in self._rows:
            try:
                self._rows[key] = read_rows(*key)
            except UserError as error:
                raise DataMissingError(str(error)) from error
        return self._rows[key]

    def given_masks(self, path: str) -> str:
        """16 hex digits of a mask file's checksum and of the weights that it belongs to."""
        if path not in self._given:
            masks = load_masks(path)
            about = [masks.checksum, masks.metadata.get("fingerprint")]
            self._given[path] = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return self._given[path]

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            UserError: a Cerebras checkpoint, which has none: its masks by weight alone can be made, and it can be
                validated; to read text it must be converted first.
        """
        if name not in self._tokenizers:
            folder = self.checkpoint(name).folder
            if folder.suffix == ".mdl":
                raise UserError(
                    f"{name} is a Cerebras checkpoint, which has no tokenizer. Convert it to a Hugging Face folder"
                    " first (to_hugging_face of sparse_ft.cerebras.convert)."
                )
            from sparse_ft.models.loading import load_tokenizer

            self._tokenizers[name] = load_tokenizer(folder)
        return self._tokenizers[name]

    def task(self, settings: DataSettings) -> Any:
        """The lm-eval task over its rows; ``num_fewshot`` is the task's own where the settings have none.

        Raises:
            DataMissingError: the rows cannot be had.
        """
        from sparse_ft.tasks.definitions import load_task
        from sparse_ft.tasks.made import MADE, made_data_dir

        key = name, data_dir, num_fewshot, include_path = _task_key(settings)
        if key not in self._tasks:
            try:
                rows = made_data_dir() if data_dir == MADE else data_dir
                self._tasks[key] = load_task(name, rows, num_fewshot, include_path, self.progress)
            except UserError as error:
                raise DataMissingError(str(error)) from error
        return self._tasks[key]

    def suite(self, cell: CellConfig) -> tuple[ScoredTask, ...]:
        """What is scored beside the cell's task; empty where nothing is.

        Raises:
            DataMissingError: a task that is not there, or rows that cannot be had; all of them at once.
        """
        if not cell.score:
            return ()
        from sparse_ft.tasks.made import MADE, made_data_dir
        from sparse_ft.tasks.suite import load_suite

        key = _suite_key(cell)
        if key not in self._suites:
            try:
                rows = made_data_dir() if cell.data_dir == MADE else cell.data_dir
                self._suites[key] = load_suite(cell.score, rows, cell.include_path, self.progress)
            except UserError as error:
                raise DataMissingError(str(error)) from error
        return self._suites[key]

    def suite_digest(self, cell: CellConfig) -> str:
        """See `sparse_ft.tasks.suite.suite_digest`."""
        from sparse_ft.tasks.suite import suite_digest

        key = _suite_key(cell)
        if key not in self._suite_digests:
            self._suite_digests[key] = suite_digest(self.suite(cell))
        return self._suite_digests[key]

    def chat_template(self, model: str) -> str:
        """16 hex digits of the chat template of the model's tokenizer.

        Raises:
            UserError: it has none.
        """
        from sparse_ft.tasks.examples import chat_template_of

        template = chat_template_of(self.tokenizer(model), model)
        return hashlib.sha256(template.encode()).hexdigest()[:16]

    def check_unchanged(self, name: str) -> None:
        """Raises ModelUnavailableError where the files of a model that was opened are others by now."""
        if _stamps(self.checkpoint(name)) != self._stamps[name]:
            raise ModelUnavailableError(
                f"the files of {name} were changed while they were in use; resume the study to run on what is there"
                " now."
            )

    def release(self) -> None:
        """Drops the base model; it is loaded again when it is borrowed next."""
        self._base = None

    def end(self) -> None:
        """Ends the processes that ran cells with this one."""
        if self.group is not None:
            self.group.end()
            self.group = None

    @contextmanager
    def borrow(self, cell: CellConfig, instead: Checkpoint | None = None) -> Iterator[PreTrainedModel]:
        """The cell's base model, pristine, to be changed at will inside the block.

        After an exception the model is dropped: a wrapper may be half applied, or memory short.

        Args:
            instead: a checkpoint of other shapes, to be lent once in its place.
        """
        from sparse_ft.models.loading import load_model, load_state_into

        device = resolve_device(cell.device)
        key = (cell.model if instead is None else str(instead.folder), resolve_dtype(cell.dtype, device), device)
        self.check_unchanged(cell.model)
        if self._base is not None and self._base[0] != key:
            self._base = None  # before loading the next: two 7B models do not fit
        if self._base is None:
            source = self.checkpoint(cell.model) if instead is None else instead
            self._base = (key, load_model(source.folder, key[1], device))
        elif self._changed is not None:
            checkpoint = self.checkpoint(cell.model)
            load_state_into(self._base[1], checkpoint, None if self._changed == "all" else checkpoint.prunable)
        self._changed = "all" if MODES[cell.mode].trains_weights else "prunable"
        model = self._base[1]
        for parameter in model.parameters():  # PEFT froze them for the cell before
            parameter.requires_grad_(True)
        try:
            yield model
        except BaseException:
            self._base = None
            raise
        if instead is not None:
            self._base = None

    def untuned(self, key: str, name: str, measure: Callable[[], Evaluation]) -> tuple[str, Evaluation]:
        """The score of a model before fine-tuning: measured by the first cell that asks, shared by the rest.

        Args:
            key: identity of the score; see `sparse_ft.cell.identity.untuned_key`.
            name: of the cell that asks.
            measure: scores the model.

        Returns:
            the name of the cell that measured, and the score.
        """
        if key not in self._untuned:
            self._untuned[key] = self._measured(key, name, measure) if self._shared else (name, measure())
        return self._untuned[key]

    def _measured(self, key: str, name: str, measure: Callable[[], Evaluation]) -> tuple[str, Evaluation]:
        """The score from the shared folder; measured, and left there, by the first worker that comes."""
        from sparse_ft.evaluation import Evaluation

        path = self._shared / f"{key[:32]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # whoever comes second waits, which takes no longer than to measure again
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
                if found.get("key") == key:
                    return found["measured_by"], Evaluation(found["metrics"], found["protocol"])
            evaluation = measure()
            record = {"key": key, "measured_by": name, "metrics": evaluation.metrics, "protocol": evaluation.protocol}
            write_text(path, json.dumps(record, default=str))
            return name, evaluation


def _task_key(settings: DataSettings) -> tuple[str, str | None, int | None, str | None]:
    return settings.task, settings.data_dir, getattr(settings, "num_fewshot", None), settings.include_path


def _suite_key(cell: CellConfig) -> tuple[Any, ...]:
    return cell.score, cell.data_dir, cell.include_path


def _stamps(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """Size, time and place of every file of weights: what writing to one, or replacing it, changes."""
    found = []
    for file in checkpoint.files:
        try:
            state = file.stat()
            found.append((state.st_size, state.st_mtime_ns, state.st_ino))
        except OSError:
            found.append((-1,))
    return found
