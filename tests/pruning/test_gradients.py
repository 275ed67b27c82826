"""Gradient statistics against autograd by hand."""

import pytest
import torch

from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model
from sparse_ft.models.names import slots
from sparse_ft.pruning import gradients
from sparse_ft.pruning.gradients import gradient_statistics


def by_hand(folder, text):
    model = load_model(folder, "float32", "cpu")
    checkpoint = Checkpoint(folder)
    where = slots(checkpoint.config, checkpoint.prunable)
    parameters = dict(model.named_parameters())
    sums = {}
    for ids in text:
        logits = model(input_ids=ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        for name, slot in where.items():
            gradient, weight = slot.view(grads[slot.parameter]), slot.view(parameters[slot.parameter])
            mean, product = sums.setdefault(name, [0, 0])
            sums[name] = [mean + gradient.abs() / len(text), product + (gradient * weight).abs() / len(text)]
    return sums


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-mixtral"])
def test_means_are_autograds(tiny_model, kind, text):
    folder = tiny_model(kind)
    ours = gradient_statistics(folder, text, ("gradient", "product"), "float32")
    oracle = by_hand(folder, text)
    assert set(ours["gradient"]) == set(oracle) == set(Checkpoint(folder).prunable)
    for name, (mean, product) in oracle.items():
        torch.testing.assert_close(ours["gradient"][name], mean.detach(), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(ours["product"][name], product.detach(), rtol=1e-4, atol=1e-8)


def test_gradients_are_freed_one_by_one(tiny_model, text, monkeypatch):
    alive = []
    adder = gradients._adder

    def counting(name, sums):
        add = adder(name, sums)

        def hook(parameter):
            alive.append(sum(p.grad is not None for p in models[0].parameters()))
            add(parameter)

        return hook

    models = []
    load = gradients.load_model
    monkeypatch.setattr(gradients, "load_model", lambda *a: models.append(load(*a)) or models[0])
    monkeypatch.setattr(gradients, "_adder", counting)
    gradient_statistics(tiny_model("tiny-llama"), text[:2], dtype="float32")
    assert len(alive) == 2 * 14  # every prunable tensor, every sample
    assert set(alive) == {1}
    assert all(parameter.grad is None for parameter in models[0].parameters())


def test_a_loss_that_is_no_number_is_an_error(tiny_model, text, monkeypatch):
    load = gradients.load_model

    def broken(*arguments):
        model = load(*arguments)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(gradients, "load_model", broken)
    with pytest.raises(UserError, match="sample 0 is nan"):
        gradient_statistics(tiny_model("tiny-llama"), text)
