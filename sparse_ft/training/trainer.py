"""Fine-tuning with the Hugging Face Trainer: loss on the answers only, and what it cost."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparse_ft.environment import arithmetic_variables, one_process
from sparse_ft.errors import UserError
from sparse_ft.lora.adamw import DitheredAdamW
from sparse_ft.lora.keeping import Keeping
from sparse_ft.lora.kernels import made_by
from sparse_ft.lora.rounding import DITHERED_DTYPES
from sparse_ft.memory import peak_bytes, reset_peak
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.field import part_of
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.examples import Example, check_ids
from sparse_ft.training.collator import AnswerCollator, for_model
from sparse_ft.training.distillation import Distillation
from sparse_ft.training.shares import Shares, clip_gradients, shares_of
from sparse_ft.training.watch import Report, TrainingResult, Watch

__all__ = ["train"]

_APART = ("sdpa", "eager")  # whose masks keep the documents of a batch apart


@one_process()
def train(
    model: torch.nn.Module,
    examples: Sequence[Example],
    settings: TrainingSettings,
    output_dir: str | Path,
    pad_token_id: int = 0,
    progress: Progress = SILENT,
    callbacks: Sequence[TrainerCallback] = (),
    distillation: Distillation | None = None,
    report: Report = lambda step, values: None,
    after_backward: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Trains the parameters of ``model`` that require gradients, in place, and leaves it in eval mode.

    In one process, whatever a launcher left in the environment (see `sparse_ft.environment`); where the parameters are
    sharded, each process of the group calls this, with the same arguments, and reads its rows of every batch: see
    `sparse_ft.training.shares`. The learning rate
    climbs to its peak in ceil(``warmup_fraction`` * steps) equal stairs and then stays there, or falls in a line or
    half a cosine that reaches 0 after the last step: no step has a learning rate of 0.

    Args:
        model: a causal language model or a PEFT model around one, on its device.
        examples: tokenised examples, see `sparse_ft.tasks.examples`.
        settings: see `TrainingSettings`.
        output_dir: the Trainer's; nothing is written there.
        pad_token_id: any id; padding is masked.
        distillation: a teacher whose outputs count in the loss. Batches of one step then weigh the same, whatever their
            numbers of tokens.
        callbacks: of the Trainer, besides the ones that measure here. What they take counts as training time.
        report: told what every step gave, as it ends; see `sparse_ft.training.watch.Watch`.
        after_backward: called after each batch, before gradients are measured or used.

    Raises:
        UserError: settings that cannot train, or no examples.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    settings.check()
    if not examples:
        raise UserError("There are no training examples; is the task's train split empty?")
    rows = [vars(example) for example in examples]
    settings = replace(settings, max_steps=settings.steps_over(len(rows)))
    check_ids((max(example.input_ids) for example in examples), model.get_input_embeddings().weight.shape[0])
    attention = model.config._attn_implementation
    if any(len(example.documents) > 1 for example in examples) and attention not in _APART:
        raise UserError(f"packing needs attention of {' or '.join(_APART)}, this model has {attention}; leave it off.")
    device, shares = next(model.parameters()).device, shares_of(model)
    watch = Watch(settings, progress, report, distillation.parts if distillation else {})
    if settings.gradient_checkpointing is not None:
        model.enable_input_require_grads()  # reentrant checkpoints need an input that requires a gradient
    keeping = Keeping(model, device, progress.say)
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, output_dir, device),
        train_dataset=rows,
        data_collator=AnswerCollator(pad_token_id),
        callbacks=[watch, *callbacks],
        optimizer_cls_and_kwargs=_optimizer(settings, model),
        distillation=distillation,
        schedule=settings.schedule,
        keeping=keeping,
        shares=shares,
        after_backward=after_backward,
    )
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    use_cache = model.config.use_cache
    model.config.use_cache = False
    reset_peak(device)
    progress.start("train", settings.max_steps, "steps")
    # accelerate sends batches to "cuda", which is whatever device is the current one.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with current, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers warns of names that it uses itself
            trainer.train()
    finally:
        progress.stop()
        kept = keeping.chosen
        keeping.end()
        model.config.use_cache = use_cache
        if settings.gradient_checkpointing is not None:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
        model.eval()
    protocol = _protocol(settings, model, rows, device)
    if kept is not None:
        protocol |= {"effective_weights": kept, "effective_weights_by": made_by(device)}
    return watch.result(shares.largest(peak_bytes(device)), protocol)


class _Trainer(Trainer):
    """The Trainer with a schedule of our own, for in its warmup the first step has learning rate 0 and changes nothing;
    with a teacher's loss where there is one; with effective weights kept where the first batch leaves the room; and
    with a share of each batch where there are several processes, of which the Trainer itself need not know: it sees the
    whole batch, and the loss of all."""

    def __init__(
        self,
        *args: Any,
        distillation: Distillation | None,
        schedule: str,
        keeping: Keeping,
        shares: Shares,
        after_backward: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._distillation, self._schedule, self._keeping = distillation, schedule, keeping
        self._shares, self._after_backward = shares, after_backward
        if distillation is not None:
            self.model_accepts_loss_kwargs = False  # the mean of each batch's loss, not the model's own sum

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, or the weighted parts beside a teacher's."""
        if self._distillation is None:
            rows = for_model(self._shares.rows(inputs))
            return self._shares.own(super().compute_loss(model, rows, return_outputs, num_items_in_batch))
        return self._distillation.loss(model, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; gives the loss of all of it."""
        loss = super().training_step(*args, **kwargs)
        self._keeping.after_batch()
        self._after_backward()
        return self._shares.mean(loss)

    def _clip_grad_norm(self, model):
        if self._shares.size == 1:
            return super()._clip_grad_norm(model)
        return clip_gradients(model, self.args.max_grad_norm)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Linear up, then as the schedule says; step k of n has a factor above 0."""
        if self.lr_scheduler is None:
            up = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                if step < up:
                    return (step + 1) / up
                left = max(0, num_training_steps - step) / max(1, num_training_steps - up)
                return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[self._schedule]

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler


class _Arguments(TrainingArguments):
    """The Trainer's arguments, on the model's device. Left to itself the Trainer takes the first GPU, and where there
    are more it puts a whole batch on each.
    """

    model_device = None  # no field: known only after the parent is set up

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        device = super().device
        return self.model_device or device

    @property
    def n_gpu(self) -> int:
        """How many GPUs this process shares its batches out to: none beyond the model's."""
        return min(1, super().n_gpu)


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the warning that there are other processes, of which the Trainer need not know."""
    logger = logging.getLogger("transformers.training_args")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet()
def _arguments(settings: TrainingSettings, output_dir: str | Path, device: torch.device) -> TrainingArguments:
    checkpointing = settings.gradient_checkpointing
    arguments = _Arguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(settings.warmup_fraction * settings.max_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        activation_checkpointing=checkpointing is not None,
        activation_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
        # Sequences of like length share a batch, so that little is spent on padding.
        train_sampling_strategy="group_by_length",
        include_num_input_tokens_seen="non_padding",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen, not replaced by the mean
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    arguments.model_device = device
    return arguments


def _optimizer(settings: TrainingSettings, model: torch.nn.Module) -> tuple[type, dict[str, Any]] | None:
    """What keeps the small steps of low-precision weights; None: the Trainer's AdamW, which is as good in float32."""
    low = any(p.requires_grad and p.dtype in DITHERED_DTYPES for p in model.parameters())
    if not low or settings.rounding == "nearest":
        return None
    return DitheredAdamW, {"lr": settings.learning_rate, "seed": settings.seed}


def _protocol(settings: TrainingSettings, model, rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        **part_of(TrainingSettings, settings),
        "n_examples": len(rows),
        "max_seq_len_seen": max(len(row["input_ids"]) for row in rows),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **arithmetic_variables(),
    }
