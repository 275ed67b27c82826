"""A sparse adapter that is not the zero it starts as."""

import torch

from sparse_ft.lora import LoraSettings
from sparse_ft.lora.model import apply_sparse_lora
from sparse_ft.models.loading import load_model


def adapted(folder, masks):
    """The bfloat16 model of a folder with a random sparse adapter on every projection."""
    model = apply_sparse_lora(load_model(folder, "bfloat16", "cpu"), LoraSettings(lora_r=2), masks=masks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model
