"""Tiny models, masks of each method and a few steps of training, shared by the tests of sparse LoRA."""

import copy
from types import SimpleNamespace

import pytest
import torch

from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.models.loading import load_model, prunable_shapes
from sparse_ft.models.names import role
from sparse_ft.models.tiny import make_tiny


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny(kind, dtype)``: a fresh tiny model; its folder is ``tiny.folder(kind)``."""
    root, made, loaded = tmp_path_factory.mktemp("tiny"), {}, {}

    def folder(kind):
        if kind not in made:
            made[kind] = make_tiny(f"tiny-{kind}", root / kind)
        return made[kind]

    def load(kind, dtype=torch.float32):
        if (kind, dtype) not in loaded:
            model = load_model(folder(kind), torch.float32 if dtype == torch.float64 else dtype, "cpu")
            if dtype == torch.float64:
                model.double()
            if kind == "mixtral" and dtype != torch.float32:
                # torch's grouped kernel takes no float64, and no rows that are not a multiple of 16 bytes.
                model.set_experts_implementation("eager")
            loaded[kind, dtype] = model
        return copy.deepcopy(loaded[kind, dtype])

    load.folder = folder
    return load


@pytest.fixture(scope="session")
def make_masks():
    """``make_masks(model, method)``: masks of about half the weights."""

    def make(model, method="unstructured", seed=0):
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for name, (rows, columns) in prunable_shapes(model).items():
            if method == "unstructured":
                mask = torch.rand(rows, columns, generator=generator) >= 0.5
            elif method == "semi_structured":  # 2 of each 4; the rest of a row that fills no group is kept
                whole = columns // 4 * 4
                order = torch.rand(rows, whole // 4, 4, generator=generator).argsort(-1).argsort(-1)
                mask = torch.ones(rows, columns, dtype=torch.bool)
                mask[:, :whole] = (order < 2).reshape(rows, whole)
            else:  # structured: whole rows, or whole columns where the layer's input was removed
                mask = torch.ones(rows, columns, dtype=torch.bool)
                if role(model.config.to_dict(), name).map.axis == "column":
                    mask[:, torch.rand(columns, generator=generator) < 0.5] = False
                else:
                    mask[torch.rand(rows, generator=generator) < 0.5] = False
            masks[name] = mask
        return MaskSet.from_bool(masks, {"method": method})

    return make


@pytest.fixture(scope="session")
def work():
    """Small things to do with a model: ``work.batch``, ``work.steps``, ``work.logits``."""

    def batch(seed=0, rows=2, length=17):
        ids = torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids.clone()}

    def steps(model, count=3, lr=1e-2, optimizer=None):
        """Trains; returns the losses. The learning rate is high: every weight is to move."""
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.AdamW(trainable, lr=lr, weight_decay=0.1)
        losses = []
        for step in range(count):
            loss = model(**batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        return losses

    @torch.no_grad()
    def logits(model, seed=99):
        return model(input_ids=batch(seed)["input_ids"]).logits

    return SimpleNamespace(batch=batch, steps=steps, logits=logits)
