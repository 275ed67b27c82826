import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, TrainerCallback

from sparse_ft.errors import UserError
from sparse_ft.progress import Progress
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.examples import Example
from sparse_ft.training import AnswerCollator, NonFiniteLossError, train
from sparse_ft.training.trainer import _arguments


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("tiny-llama")


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 14, 14, 20, 7, 11, 30, 12]
    rows = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]
    return [Example(ids, len(ids) - 1 - index % 3) for index, ids in enumerate(rows)]


def _loss_by_hand(model, examples):
    """Mean over all answer tokens, one unpadded sequence at a time."""
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(ids).logits[0, example.answer_start - 1 : -1]
        total = total + functional.cross_entropy(logits, ids[0, example.answer_start :], reduction="sum")
        tokens += len(example.input_ids) - example.answer_start
    return total / tokens


def _rows(examples):
    return [{"input_ids": example.input_ids, "answer_start": example.answer_start} for example in examples]


def test_a_padded_batch_has_the_loss_of_its_sequences_alone(model, examples):
    batch = AnswerCollator(0)(_rows(examples))
    assert batch["labels"].shape[1] == batch["logits_to_keep"] == 4
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(_loss_by_hand(model, examples).item(), rel=1e-5)


def test_logits_are_made_at_the_answers_only(model, examples):
    batch = AnswerCollator(0)(_rows(examples))
    assert model(**batch).logits.shape[1] == 4


def test_training_is_plain_gradient_descent_on_that_loss(folder, model, examples, tmp_path):
    settings = TrainingSettings(
        learning_rate=1e-2, max_steps=3, batch_size=len(examples), warmup_fraction=0.0, max_grad_norm=1e9
    )
    told = {}
    result = train(model, examples, settings, tmp_path, report=told.__setitem__)
    twin = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    losses, norms = [], []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        loss = _loss_by_hand(twin, examples)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in twin.parameters()]).norm().item())
        optimizer.step()
    assert [loss for _, loss in result.loss_curve] == pytest.approx(losses, rel=1e-4)
    assert list(told) == [1, 2, 3] and [values["loss"] for values in told.values()] == [x for _, x in result.loss_curve]
    assert [values["grad_norm"] for values in told.values()] == pytest.approx(norms, rel=1e-3)
    assert [values["learning_rate"] for values in told.values()] == pytest.approx(
        [1e-2 * (1 - k / 3) for k in range(3)]
    )
    assert all(values["tokens_per_second"] > result.tokens / 3 / result.seconds for values in told.values())
    for trained, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(folder, examples, tmp_path):
    losses = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        settings = TrainingSettings(
            learning_rate=1e-2, max_steps=3, batch_size=batch_size, gradient_accumulation=accumulation
        )
        losses.append([loss for _, loss in train(model, examples, settings, tmp_path).loss_curve])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_checkpointing_changes_no_number(folder, examples, tmp_path, kind):
    curves = []
    for checkpointing in (None, kind):
        model = AutoModelForCausalLM.from_pretrained(folder)
        settings = TrainingSettings(learning_rate=1e-2, max_steps=3, batch_size=4, gradient_checkpointing=checkpointing)
        curves.append(train(model, examples, settings, tmp_path).loss_curve)
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_does_not(folder, examples, tmp_path):
    curves = []
    for seed in (0, 0, 1):
        model = AutoModelForCausalLM.from_pretrained(folder)
        settings = TrainingSettings(learning_rate=1e-2, max_steps=4, batch_size=2, seed=seed)
        curves.append(train(model, examples, settings, tmp_path).loss_curve)
    assert curves[0] == curves[1] != curves[2]


def test_what_it_cost_is_measured(model, examples, tmp_path):
    settings = TrainingSettings(max_steps=4, batch_size=8)
    result = train(model, examples, settings, tmp_path)
    assert result.steps == 4
    assert result.tokens == 4 * sum(len(example.input_ids) for example in examples)  # padding does not count
    assert result.warmup_steps_untimed == 2
    per_sample = result.tokens_per_second / result.samples_per_second
    assert per_sample == pytest.approx(sum(len(e.input_ids) for e in examples) / 8, rel=1e-6)
    assert result.peak_bytes > sum(p.numel() * 4 for p in model.parameters())
    assert not model.training
    assert list(tmp_path.iterdir()) == []  # no checkpoints were asked for


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(3, 1, 2), (3, 2, 1.5), (8, 1, 3), (16, 1, 1)])
def test_epochs_are_passes_over_all_rows(batch, accumulation, epochs, model, examples, tmp_path):
    settings = TrainingSettings(num_epochs=epochs, batch_size=batch, gradient_accumulation=accumulation)
    result = train(model, examples, settings, tmp_path)
    in_one = math.ceil(math.ceil(len(examples) / batch) / accumulation)
    assert result.steps == result.protocol["max_steps"] == math.ceil(epochs * in_one)
    if epochs == int(epochs):  # every token as often as there are epochs
        assert result.tokens == epochs * sum(len(example.input_ids) for example in examples)
    assert settings.examples_needed is None


def test_a_single_step_is_timed_itself(model, examples, tmp_path):
    result = train(model, examples, TrainingSettings(max_steps=1, batch_size=2), tmp_path)
    assert result.tokens_per_second is not None  # the only step is timed: nothing to leave out
    assert result.warmup_steps_untimed == 0


def test_a_loss_that_is_not_finite_stops_training(model, examples, tmp_path):
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="step 1"):
        train(model, examples, TrainingSettings(max_steps=5, batch_size=2), tmp_path)


def test_progress_is_told_of_every_step(model, examples, tmp_path):
    calls = []

    class Heard(Progress):
        def start(self, stage, total, unit=""):
            calls.append((stage, total))

        def advance(self, amount=1, note=""):
            calls.append(note.split()[0])

    train(model, examples, TrainingSettings(max_steps=3, batch_size=2), tmp_path, progress=Heard())
    assert calls == [("train", 3), "loss", "loss", "loss"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"warmup_fraction": 1},
        {"num_epochs": 0.0},
        {"schedule": "sometimes"},
        {"gradient_checkpointing": "x"},
    ],
)
def test_settings_that_cannot_train_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        TrainingSettings(**wrong).check()


def test_no_examples_is_an_error(model, tmp_path):
    with pytest.raises(UserError, match="no training examples"):
        train(model, [], TrainingSettings(), tmp_path)


def test_a_batch_is_the_batch_asked_for_however_many_gpus_there_are(tmp_path):
    arguments = _arguments(TrainingSettings(batch_size=3), tmp_path, torch.device("cuda:1"))
    arguments._n_gpu = 8  # what transformers counts on such a machine, to put a whole batch on each
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)
    assert arguments.device == torch.device("cuda:1")  # the model's, not the first


@pytest.mark.parametrize(
    ("steps", "warmup", "schedule"),
    [*((steps, warmup, "linear") for steps in (1, 2, 12) for warmup in (0.0, 0.1, 0.5, 0.99)),
     (9, 0.3, "cosine"), (1, 0.5, "cosine"), (9, 0.3, "constant")],
)  # fmt: skip
def test_every_step_has_a_learning_rate(steps, warmup, schedule, model, examples, tmp_path):
    """Against the formula: up to the peak in ceil(warmup * steps) equal stairs, then by the schedule, nowhere 0."""
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainingSettings(
        learning_rate=0.01, max_steps=steps, batch_size=1, warmup_fraction=warmup, schedule=schedule
    )
    train(model, examples, settings, tmp_path, callbacks=[Rates()])
    up = math.ceil(warmup * steps)
    down = {
        "linear": lambda part: 1 - part,
        "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
        "constant": lambda part: 1.0,
    }[schedule]
    expected = [(k + 1) / up if k < up else down((k - up) / (steps - up)) for k in range(steps)]
    assert rates == pytest.approx([0.01 * factor for factor in expected])
    assert min(rates) > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_ids_that_the_model_does_not_have_are_one_line(model, examples, tmp_path):
    outside = [*examples, Example([1, 2, model.config.vocab_size], 2)]
    with pytest.raises(UserError, match="belong together"):
        train(model, outside, TrainingSettings(max_steps=1), tmp_path)
