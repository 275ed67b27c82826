"""The parameters of one cell of a study, composed of those of its parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparse_ft.levels import level_label, levels_text, parse_levels
from sparse_ft.settings.commands import KEEP_FORMATS, TRAINERS, MaskConfig
from sparse_ft.settings.corpora import TASK
from sparse_ft.settings.field import Settings, defaults, named, part_of, plain_values, setting, unsaid
from sparse_ft.settings.lora import LoraSettings
from sparse_ft.settings.model import DataSettings, ModelSettings
from sparse_ft.settings.modes import DENSE, MODES, NOT_TUNED, SPARSE_TO_SPARSE
from sparse_ft.settings.pruning import CALIBRATION, TUNING, RecipeSettings
from sparse_ft.settings.recovery import TUNED, RecoverySettings
from sparse_ft.settings.rules import AUTO, EXPERTS, RANDOM, STEPS
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.settings.training_data import TrainingDataSettings

__all__ = ["NAME_LENGTH", "CellConfig", "SparsitySettings", "TrainConfig", "mask_set_of", "name_problem"]

_TRAINING = tuple(
    name for name in (defaults(TrainingSettings) | defaults(TrainingDataSettings)) if name not in ("seed", "rounding")
)
_IN_ADDRESSES = "/:@#?%\\"  # what models:/NAME@ALIAS gives a meaning to
NAME_LENGTH = 250  # characters of a registered model's name


@dataclass(frozen=True)
class SparsitySettings(Settings):
    """What of a model is sparse, and how much of it."""

    mode: str = setting(
        SPARSE_TO_SPARSE.name,
        "dense (no pruning), sparse_to_dense, sparse_to_sparse (keeps every zero), full (all weights are trained"
        " under the mask, without LoRA), or pruned (nothing is trained).",
        choices=tuple(MODES),
        needed=True,
    )
    masks: str | None = setting(
        None,
        "a mask file, or none to compute masks from method, importance, scope and sparsity.",
        path=(),
        needed=True,
        named=True,
        behind="versions",
        time=False,
    )
    sparsity: float = setting(
        0.5,
        "fraction of the prunable weights to set to zero, or of the experts to remove (dense ignores it).",
        needed=True,
        time=False,
    )


@dataclass(frozen=True)
class CellConfig(
    ScoringSettings,
    RecoverySettings,
    TrainingDataSettings,
    TrainingSettings,
    LoraSettings,
    RecipeSettings,
    SparsitySettings,
    DataSettings,
    ModelSettings,
):
    """Prunes, fine-tunes, merges, proves and scores one model: one cell of a study."""

    max_seq_len: int = setting(512, "longest training sequence in tokens; prompts are cut on the left.", least=2)
    score_untuned: bool = setting(True, "score the pruned model before fine-tuning too.")
    measure: bool = setting(
        False,
        "measure bytes and tokens per second of the merged model in every form that its masks allow (docs/serving.md).",
        later=True,
    )
    gpus_per_cell: int = setting(
        1,
        "processes that run a cell together, each with a share of the model's parameters on its own GPU, for models"
        " larger than one; on a CPU, processes (docs/study.md).",
        least=1,
        later=True,
    )
    keep: str = setting(
        "adapter",
        "what stays on disk: nothing, the adapter, or the merged checkpoint as well.",
        choices=("none", "adapter", "all"),
        result=False,
    )
    keep_format: str = setting(
        "plain",
        "of a merged checkpoint that stays: plain, or packed into the weights that its masks keep (modes that keep"
        " their zeros; see sparse-ft unpack). The registry has plain ones.",
        choices=KEEP_FORMATS,
        result=False,
    )
    output_dir: str = setting(
        "outputs/train", "folder for masks, adapter and merged checkpoint.", path=(), result=False
    )
    register_as: str | None = setting(None, "name in the model registry for the merged model, or none.", result=False)

    @property
    def pruned(self) -> bool:
        """Whether masks are applied at all."""
        return MODES[self.mode].masked_base

    @property
    def unpruned(self) -> bool:
        """Whether it is the dense model as it is: nothing pruned, no rule asked for, nothing trained."""
        recipe = defaults(RecipeSettings)
        plain = all(getattr(self, name) == recipe[name] for name in ("method", "importance", *STEPS))
        return self.sparsity == 0 and self.masks is None and plain and not MODES[self.mode].trains

    @property
    def recovered(self) -> bool:
        """Whether the pruned model is trained on text before the task."""
        return self.recovers and self.pruned and MODES[self.mode].trains

    @property
    def has_teacher(self) -> bool:
        """Whether a dense model teaches: in recovery, or, without one, on the task."""
        return self.taught and self.pruned and MODES[self.mode].trains

    @property
    def lifts_masks(self) -> bool:
        """Whether the teacher is the base under the student's adapter, its masks lifted, and takes no memory."""
        same = self.teacher == DENSE.name and not self.changes_weights and self.method != EXPERTS
        return self.has_teacher and same and not MODES[self.mode].trains_weights

    @property
    def has_tuned_teacher(self) -> bool:
        """Whether the study's dense baseline teaches."""
        return self.has_teacher and self.teacher == TUNED

    def canonical(self) -> dict[str, Any]:
        """Everything that the result depends on, by the names it was asked for with. Fields that cannot matter under
        the others (the pruning of a dense cell, the pattern of masks that have none) are none or their default, so
        that two cells which compute the same say the same. An update stands there only where it is not the
        importance's own."""
        values: dict[str, Any] = {"update": self.other_update or AUTO}
        blank = []
        if not self.pruned:
            values.update(masks=None, method=None, importance=None, scope=None, sparsity=0.0)
            blank += [*STEPS, "pattern", "allocation", *CALIBRATION, "force"]
        elif self.method == "random":
            values.update(importance=None, scope=None)
            blank += ["allocation"]
        elif self.method == "semi_structured":
            values.update(scope="layer")
        elif self.method == EXPERTS:
            values.update(importance=self.rule.name)
        if self.method != "semi_structured":
            blank += ["pattern"]
        if not self.needs_calibration:
            blank += CALIBRATION
        if not (self.pruned and self.reconstructs):
            blank += TUNING
        if not MODES[self.mode].lora:
            blank += [name for name in defaults(LoraSettings) if name != "rounding"]
        if not (self.pruned and MODES[self.mode].trains):
            blank += defaults(RecoverySettings)
        blank += [name for name in defaults(RecoverySettings) if name.startswith("recover_") and not self.recovers]
        blank += [name for name in defaults(RecoverySettings) if name.startswith("teacher_") and not self.taught]
        if not MODES[self.mode].trains:
            values.update(rounding="nearest")
            blank += [*_TRAINING, "max_seq_len", "score_untuned", "gpus_per_cell"]
        if self.mix is None:
            blank += ["mix_weight"]
        if self.num_epochs is not None:
            blank += ["max_steps"]
        if self.dtype == "float32":
            values.update(rounding="nearest")  # whatever was asked
        values |= {name: value for name, value in defaults(CellConfig).items() if name in blank}
        cell = replace(self, **values).settled()
        said, left_out = plain_values(cell), unsaid(cell)
        return {name: said[name] for name in named(CellConfig, result=True, flag=True) if name not in left_out}

    def key(self) -> str:
        """What the cell asks for, by name: SHA-256 (16 hex digits) of its canonical form. What it computes also
        depends on what the names stand for: see `sparse_ft.cell.identity.cell_key`."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """A short name for people. What tells a study's cells apart comes first: MLflow's table of runs cuts
        names after a dozen letters."""
        model = self.model.rstrip("/").split("/")[-1]
        if not self.pruned or self.unpruned:
            name = f"{DENSE.label}, {NOT_TUNED}" if self.pruned else DENSE.label
            return f"{name} · {self.task} · {model}"
        kind = self.method if self.rule is RANDOM else f"{self.method} {self.rule.name}"
        kind += "".join(f"+{step}" for step in self.steps.values())
        return f"{level_label(self.sparsity)} % {MODES[self.mode].short} {kind} · {self.task} · {model}"

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        # What a mask file says of itself may be anything: an importance of one's own, or of another version.
        asked = self if self.masks is None else replace(self, **defaults(RecipeSettings))
        yield from super(CellConfig, asked).problems()
        possible = 0 <= self.sparsity <= 1
        if self.pruned and not possible:
            yield f"sparsity is {self.sparsity}; it must lie between 0 and 1 (50 % is 0.5)."
        if self.has_teacher and self.teacher_squarehead and self.gradient_checkpointing == "reentrant":
            yield ("gradient_checkpointing reentrant hides the blocks' outputs from the teacher; take non_reentrant.")
        if self.gpus_per_cell > 1:
            yield from self._not_in_groups()
        if self.register_as not in (None, "auto") and (problem := name_problem(self.register_as)):
            yield problem
        if (kind := mask_set_of(self)) is not None and possible:
            yield from replace(kind, sparsities=(self.sparsity,)).problems()

    def _not_in_groups(self) -> Iterator[str]:
        said = f"gpus_per_cell is {self.gpus_per_cell}, but"
        if re.fullmatch(r"cuda:\d+", self.device):
            yield f"{said} device is {self.device}; leave it at auto, and name the GPUs in CUDA_VISIBLE_DEVICES."
        if self.measure:
            yield f"{said} measure is for one device; measure the merged checkpoint (keep: all, sparse-ft measure)."
        if self.recovered:
            yield f"{said} recovery trains on one device; leave recover_steps out."
        if self.has_teacher:
            yield f"{said} a teacher needs a cell on one device; leave teacher out."


@dataclass(frozen=True)
class TrainConfig(CellConfig):
    """Prunes, fine-tunes, merges, proves and scores one model: one cell, as a run of its own."""

    trainer: str = setting(
        "local", "how it is trained: in this process (local), or on a Cerebras cluster (cerebras).", choices=TRAINERS
    )
    cerebras: str | None = setting(
        None, "YAML file that says where trainer cerebras trains (see docs/cerebras.md), or none.", path=()
    )
    mask_levels: tuple[float, ...] = setting(
        (),
        "lower levels whose masks are made first, as in a study, or none: a rule that reads text prunes what they prune"
        " and then more, so its masks depend on them.",
        read=lambda text: () if text == "none" else parse_levels(text, "mask_levels"),
        write=lambda levels: levels_text(levels) or "none",
        result=False,
    )

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        if self.has_tuned_teacher:
            yield f"teacher {TUNED} is the dense baseline of a study (sweep); give the run of one: runs:/ID."
        if self.mask_levels and (not self.pruned or self.masks is not None):
            yield "mask_levels is for masks that are made here: leave it out beside masks, or where nothing is pruned."
        if self.mask_levels and max(self.mask_levels) >= self.sparsity:
            yield f"mask_levels has {max(self.mask_levels):g}; masks at {self.sparsity:g} depend on lower levels only."


def mask_set_of(cell: CellConfig) -> MaskConfig | None:
    """The mask set that a cell needs, without levels; cells with equal ones share it. None: it needs none.

    Fields that cannot change the masks are set to one value: task and device for data-free importances, the seed
    where nothing is drawn, the pattern where there is none.
    """
    if not cell.pruned or cell.masks is not None:
        return None
    kind = MaskConfig(**part_of(MaskConfig, cell) | {"sparsities": (), "output_dir": ""})
    kind = replace(kind, scope="layer") if kind.method in ("random", "semi_structured") else kind
    kind = replace(kind, pattern=MaskConfig.pattern) if kind.method != "semi_structured" else kind
    kind = replace(kind, importance="magnitude") if kind.method == "random" else kind
    kind = replace(kind, importance=kind.rule.name) if kind.method == EXPERTS else kind
    kind = replace(kind, update=kind.other_update or MaskConfig.update)
    if not kind.reconstructs:
        kind = replace(kind, **{name: value for name, value in defaults(MaskConfig).items() if name in TUNING})
    no_task = {"task": "", "include_path": None}
    if cell.needs_calibration:
        return kind if kind.calibration_corpus == TASK else replace(kind, **no_task)
    blank = {name: getattr(MaskConfig, name) for name in CALIBRATION}
    kind = replace(kind, **no_task, **blank, data_dir=None, device="auto", dtype="auto")
    return kind if kind.method == "random" else replace(kind, seed=0)


def name_problem(name: str) -> str | None:
    """Why ``name`` is none of a registered model: the registry refuses it, or no address could hold it."""
    bad = [character for character in name if character in _IN_ADDRESSES or not character.isprintable()]
    if bad or name != name.strip() or name in ("", ".", "..") or len(name) > NAME_LENGTH:
        return (
            f"register_as is {name!r}: a registered model's name has 1 to {NAME_LENGTH} characters, none of them "
            f"{' '.join(_IN_ADDRESSES)} or a line break, and no space at either end; or take 'auto'"
        )
    return None
