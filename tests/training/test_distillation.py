import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sparse_ft.lora.model import apply_sparse_lora
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.loading import prunable_shapes
from sparse_ft.settings.lora import LoraSettings
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.examples import Example
from sparse_ft.training import train
from sparse_ft.training.collator import AnswerCollator
from sparse_ft.training.distillation import Distillation, kl_divergence, squarehead


@pytest.fixture
def teacher(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("tiny-llama")).eval().requires_grad_(False)


@pytest.fixture
def masks(teacher):
    generator = torch.Generator().manual_seed(1)
    return MaskSet.from_bool({n: torch.rand(s, generator=generator) > 0.5 for n, s in prunable_shapes(teacher).items()})


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (12, 20, 9, 20)]
    return [Example(ids, 1 + 2 * index) for index, ids in enumerate(rows)]


def test_squarehead_is_its_formula():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(4)] for _ in range(2))
    counted = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = [
        ((s - t)[counted] ** 2).mean() / (t[counted] ** 2).mean() for s, t in zip(student, teacher, strict=True)
    ]
    found = squarehead([s.float() for s in student], [t.float() for t in teacher], counted)
    assert float(found) == pytest.approx(float(sum(expected) / 4), rel=1e-6)
    assert float(squarehead(teacher, teacher, counted)) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_its_formula_and_of_few_tokens_never_more(temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(6, 40, dtype=torch.float64), 3 * torch.randn(6, 40, dtype=torch.float64)
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    expected = float((p * (p / q).log()).sum(-1).mean()) * temperature**2
    assert float(kl_divergence(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(student, teacher, temperature, 40)) == pytest.approx(expected, rel=1e-5)
    few = [float(kl_divergence(student, teacher, temperature, k)) for k in (1, 5, 20, 39)]
    assert few == sorted(few) and few[-1] <= expected * (1 + 1e-6)
    top = p.topk(5, -1)
    rest = (1 - top.values.sum(-1)) * ((1 - top.values.sum(-1)) / (1 - q.gather(-1, top.indices).sum(-1))).log()
    by_hand = (top.values * (top.values / q.gather(-1, top.indices)).log()).sum(-1) + rest
    assert few[1] == pytest.approx(float(by_hand.mean()) * temperature**2, rel=1e-5)
    assert float(kl_divergence(teacher, teacher, temperature, 5)) == pytest.approx(0, abs=1e-6)


def _parts_by_hand(student, teacher, examples):
    """Cross entropy, KL and SquareHead, one unpadded sequence at a time."""
    entropy = divergence = tokens = 0.0
    squares = [[0.0, 0.0] for _ in teacher.model.layers]
    for example in examples:
        ids = torch.tensor([example.input_ids])
        outputs = []
        for model in (student, teacher):
            hidden, hooks = [], []
            for block in model.model.layers:
                hooks.append(block.register_forward_hook(lambda _, __, out, hidden=hidden: hidden.append(out)))
            logits = model(ids).logits[0, example.answer_start - 1 : -1]
            [hook.remove() for hook in hooks]
            outputs.append((logits, [h[0] if isinstance(h, tuple) else h for h in hidden]))
        (s, hidden), (t, known) = outputs
        entropy += functional.cross_entropy(s, ids[0, example.answer_start :], reduction="sum")
        divergence += (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum()
        tokens += len(s)
        for pair, a, b in zip(squares, hidden, known, strict=True):
            pair[0] += (a - b).square().sum()
            pair[1] += b.square().sum()
    return entropy / tokens, divergence / tokens, sum(a / b for a, b in squares) / len(squares)


@pytest.mark.parametrize("mode", ["sparse_to_sparse", "full"])
def test_the_loss_of_a_batch_is_that_of_its_sequences_alone_padding_left_out(teacher, masks, examples, mode):
    plain = copy.deepcopy(teacher).requires_grad_(True)
    student = apply_sparse_lora(plain, LoraSettings(), mode, masks)
    batch = AnswerCollator(0)([{"input_ids": e.input_ids, "answer_start": e.answer_start} for e in examples])
    distillation = Distillation(teacher, "model.layers", ce=0.5, kl=2.0, squarehead=3.0)
    loss = distillation.loss(student.eval(), batch)
    with torch.no_grad():
        expected = _parts_by_hand(student.get_base_model() if mode != "full" else student, teacher, examples)
    found = [distillation.parts[name][0] for name in ("ce", "kl", "squarehead")]
    assert found == pytest.approx([float(part) for part in expected], rel=2e-5)
    assert loss.item() == pytest.approx(0.5 * found[0] + 2 * found[1] + 3 * found[2], rel=1e-6)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    only = Distillation(teacher, "model.layers", ce=0.0, kl=0.0)
    only.loss(student, batch)
    assert set(only.parts) == {"squarehead"}


@pytest.mark.slow
def test_a_taught_student_comes_nearer_to_its_teacher(teacher, masks, examples, tmp_path):
    settings = TrainingSettings(max_steps=12, batch_size=4, learning_rate=5e-3)
    distance = {}
    for taught in (False, True):
        student = apply_sparse_lora(copy.deepcopy(teacher).requires_grad_(True), LoraSettings(), "full", masks)
        guide = Distillation(teacher, "model.layers", ce=0.0) if taught else None
        result = train(student, examples, settings, tmp_path, distillation=guide)
        probe = Distillation(teacher, "model.layers")
        batch = AnswerCollator(0)([{"input_ids": e.input_ids, "answer_start": e.answer_start} for e in examples])
        with torch.no_grad():
            probe.loss(student, batch)
        distance[taught] = probe.parts["squarehead"][0], probe.parts["kl"][0]
        if taught:
            assert [len(values) for values in guide.parts.values()] == [12, 12]
            assert result.loss_curve[-1][1] < result.loss_curve[0][1]
    assert distance[True][0] < 0.9 * distance[False][0] and distance[True][1] < distance[False][1]


def test_checkpoints_change_neither_the_parts_nor_the_gradients(teacher, masks, examples):
    batch = AnswerCollator(0)([{"input_ids": e.input_ids, "answer_start": e.answer_start} for e in examples])
    found = []
    for checkpointing in (False, True):
        student = apply_sparse_lora(copy.deepcopy(teacher).requires_grad_(True), LoraSettings(), "full", masks).train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        guide = Distillation(teacher, "model.layers")
        guide.loss(student, batch).backward()
        found.append((guide.parts, {name: p.grad for name, p in student.named_parameters()}))
    (parts, gradients), (again, others) = found
    assert parts == again and all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_parts_have_a_point_a_step_however_many_batches_a_step_has(teacher, masks, examples, tmp_path):
    """Of four batches an epoch a step takes three, and the last of an epoch the one that is left."""
    settings = TrainingSettings(num_epochs=2, batch_size=1, gradient_accumulation=3)
    student = apply_sparse_lora(copy.deepcopy(teacher).requires_grad_(True), LoraSettings(), "full", masks)
    guide, told = Distillation(teacher, "model.layers", squarehead=0), {}
    result = train(student, examples, settings, tmp_path, distillation=guide, report=told.__setitem__)
    for part in ("ce", "kl"):
        batches = guide.parts[part]
        means = [sum(some) / len(some) for some in (batches[:3], batches[3:4], batches[4:7], batches[7:])]
        assert len(batches) == 8 and result.parts[part] == list(enumerate(means, 1))
        assert [values[part] for values in told.values()] == means
    assert list(told) == [1, 2, 3, 4] and set(result.parts) == {"ce", "kl"}
