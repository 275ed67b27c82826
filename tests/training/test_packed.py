"""Packed windows are trained as their documents would be alone: in every family, whatever its attention."""

import pytest
import torch
from torch.nn import functional

from sparse_ft.errors import UserError
from sparse_ft.models.loading import load_model
from sparse_ft.models.tiny import KINDS
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.examples import Example
from sparse_ft.tasks.packing import packed
from sparse_ft.training import train
from sparse_ft.training.collator import AnswerCollator, for_model
from sparse_ft.training.distillation import Distillation


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    sizes = (9, 14, 5, 20, 7, 11, 12)
    rows = [torch.randint(3, 500, (size,), generator=generator).tolist() for size in sizes]
    return [Example(ids, 1 + index % 3) for index, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def batch(documents):
    """Three windows of unequal lengths, all padded but the longest."""
    windows = list(packed(documents, 30))
    assert [len(window.documents) for window in windows] != [1] * len(windows) and len(windows) > 2
    return AnswerCollator(0)([vars(window) for window in windows]), windows


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_separate_passes(kind, tiny_model, batch):
    model = load_model(tiny_model(kind), torch.float32, "cpu").eval()
    values, windows = batch
    together = model(**for_model({**values, "logits_to_keep": 0})).logits
    for row, window in zip(together, windows, strict=True):
        begin, ids = len(row) - len(window.input_ids), window.input_ids
        for size in window.documents:
            alone = model(torch.tensor([ids[:size]])).logits[0]
            torch.testing.assert_close(row[begin : begin + size], alone, rtol=1e-4, atol=1e-4)
            begin, ids = begin + size, ids[size:]


def test_the_loss_is_that_of_the_documents_alone(tiny_model, batch, documents):
    model = load_model(tiny_model("tiny-llama"), torch.float32, "cpu")
    total, tokens = 0.0, 0
    for document in documents:
        ids, start = torch.tensor([document.input_ids]), document.answer_start
        total += functional.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum").item()
        tokens += len(document.input_ids) - start
    assert model(**for_model(batch[0])).loss.item() == pytest.approx(total / tokens, rel=1e-5)


def test_a_teacher_sees_the_documents_apart_too(tiny_model, batch, documents):
    """All parts of the loss against the batch of the same documents, each in a row of its own."""
    student = load_model(tiny_model("tiny-llama"), torch.float32, "cpu")
    teacher = load_model(tiny_model("tiny-llama"), torch.float32, "cpu")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    parts = []
    for values in (batch[0], AnswerCollator(0)([vars(document) for document in documents])):
        guide = Distillation(teacher, "model.layers")
        guide.loss(student, values)
        parts.append({name: value for name, (value,) in guide.parts.items()})
    assert parts[0] == pytest.approx(parts[1], rel=1e-4)


def test_training_on_windows(tiny_model, documents, tmp_path):
    model = load_model(tiny_model("tiny-llama"), torch.float32, "cpu")
    settings = TrainingSettings(num_epochs=1, batch_size=2, learning_rate=1e-3)
    result = train(model, list(packed(documents, 30)), settings, tmp_path)
    assert result.tokens == sum(len(document.input_ids) for document in documents)  # padding does not count
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="packing needs attention of sdpa or eager, this model has flash_attention_2"):
        train(model, list(packed(documents, 30)), settings, tmp_path)
