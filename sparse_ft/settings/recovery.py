"""The parameters of recovery on text, and of the dense teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from sparse_ft.settings.corpora import TASK, corpus_problem, corpus_words
from sparse_ft.settings.field import Settings, setting
from sparse_ft.settings.modes import DENSE

__all__ = ["TEACHERS", "TUNED", "RecoverySettings"]

TUNED = "dense_tuned"  # the study's own dense baseline
TEACHERS = ("none", DENSE.name, TUNED)
_RUN = "runs:/"

_later = partial(setting, later=True, time=False)


@dataclass(frozen=True)
class RecoverySettings(Settings):
    """How a pruned model is brought back before the task: trained on text, under its mask."""

    recover_steps: int = setting(
        0,
        "optimizer steps of recovery: the pruned model is trained on text, under its mask, before the task; 0: none.",
        least=0,
        later=True,
    )
    recover_corpus: str = _later(
        TASK,
        "text of recovery: task (its training texts), wikitext2, c4, fineweb_edu (of data_dir/corpora or"
        " the hub), or a file.",
        path=corpus_words(),
        needed=True,
        named=True,
    )
    recover_seq_len: int = setting(256, "tokens of each window of recovery.", least=2, later=True)
    recover_batch_size: int = setting(8, "windows of a step of recovery.", least=1, later=True)
    recover_learning_rate: float = _later(1e-3, "peak of recovery's linear schedule.")
    teacher: str = setting(
        "none",
        "whose logits and blocks' outputs are matched, in recovery or, without one, in training on the task: dense (the"
        " unpruned model), dense_tuned (the study's dense fine-tuned baseline of the same task and seed), or a model of"
        " the same tokenizer: a folder, owner/name, or runs:/ID of a finished cell.",
        path=TEACHERS,
        needed=True,
        later=True,
    )
    teacher_ce: float = _later(1.0, "weight of the labels' cross entropy beside a teacher.", least=0)
    teacher_kl: float = _later(1.0, "weight of the divergence of the logits from the teacher's.", least=0)
    teacher_squarehead: float = _later(1.0, "weight of the error of the blocks' outputs (SquareHead).", least=0)
    teacher_temperature: float = _later(1.0, "that both models' logits are divided by.")

    @property
    def recovers(self) -> bool:
        """Whether there is a recovery."""
        return self.recover_steps > 0

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher != "none"

    @property
    def names_teacher(self) -> bool:
        """Whether the teacher is a model of its own, by name, or a run's."""
        return self.teacher not in TEACHERS

    @property
    def teacher_run(self) -> str:
        """The run whose model teaches; empty where none is named."""
        return self.teacher.removeprefix(_RUN) if self.teacher.startswith(_RUN) else ""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from super().problems()
        if not 0 < self.recover_learning_rate < 10:
            yield f"recover_learning_rate is {self.recover_learning_rate}; it must be above 0 (typical: 1e-4 to 1e-3)."
        if not 0 < self.teacher_temperature < math.inf:
            yield f"teacher_temperature is {self.teacher_temperature}; it must be above 0."
        if self.taught and not self.teacher_ce + self.teacher_kl + self.teacher_squarehead > 0:
            yield "teacher_ce, teacher_kl and teacher_squarehead are all 0: nothing is left to train by."
        if self.teacher.startswith("models:/") or "/" in self.teacher_run or self.teacher == _RUN:
            yield f"teacher is '{self.teacher}'; of what runs have made give runs:/ID, the run of a finished cell."
        if self.recovers and (problem := corpus_problem("recover_corpus", self.recover_corpus)):
            yield problem
