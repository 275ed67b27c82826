"""What the local trainer refuses before anything is made."""

from dataclasses import replace

import pytest

from sparse_ft.cell.trainer import LOCAL
from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.cell import CellConfig


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        ("tiny-llama", {"target_modules": ("q_proj", "w1")}, "target_modules w1: this model has"),
        ("tiny-mixtral", {"lora_dropout": 0.1}, "lora_dropout must be 0 on experts"),
        ("tiny-mixtral", {"target_modules": ("w1", "w2")}, "w1 and w3 together"),
    ],
)
def test_adapters_that_a_model_cannot_have(tiny_model, model, values, said):
    cell, checkpoint = CellConfig(model=model, **values), Checkpoint(tiny_model(model))
    with pytest.raises(UserError, match=said):
        LOCAL.check(cell, checkpoint)
    LOCAL.check(replace(cell, mode="full"), checkpoint)  # which has none
