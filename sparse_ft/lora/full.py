"""Full fine-tuning of a pruned model: every parameter trains, masked weights stay zero."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from sparse_ft.lora.function import prune_
from sparse_ft.masks.mask_set import MaskSet, pack_bits
from sparse_ft.models.loading import apply_masks
from sparse_ft.models.names import parameter_masks
from sparse_ft.models.sharding import own_masks, own_rows

__all__ = ["hold_masked_weights", "masked_gradients", "release_masked_weights"]

_HANDLES = "_sparse_ft_gradient_masks"


def hold_masked_weights(model: PreTrainedModel, masks: MaskSet | None) -> PreTrainedModel:
    """Makes every parameter trainable, zeroes the masked weights, and masks their gradients from now on.

    A masked weight is +0.0 and its gradient exactly zero at every step, so momentum and Adam's moments stay
    zero, weight decay multiplies zero, and accumulated or averaged gradients are zero too: no optimizer
    needs to know of the mask. The hooks sit on the parameters, so a copy of the model has none.

    Raises:
        UserError: masks that do not fit.
    """
    release_masked_weights(model)
    model.requires_grad_(True)
    if masks is None:
        return model
    apply_masks(model, masks)
    handles = []
    for name, mask in parameter_masks(model.config.to_dict(), masks).items():
        parameter = model.get_parameter(name)
        handles.append(parameter.register_hook(_gradient_mask(pack_bits(mask).to(parameter.device))))
    setattr(model, _HANDLES, handles)
    return model


def masked_gradients(model: PreTrainedModel, masks: MaskSet) -> Callable[[], None]:
    """What masks the gradients of a sharded model, in place, after each backward pass: hooks see none of them.

    Each process keeps the bits of its own rows.
    """
    held = list(own_masks(model, masks))

    def mask() -> None:
        for parameter, index, packed in held:
            if parameter.grad is not None:
                prune_(own_rows(parameter.grad)[0][index], packed)

    return mask


def release_masked_weights(model: PreTrainedModel) -> None:
    """Takes the gradient masks off again; the weights stay as they are."""
    for handle in getattr(model, _HANDLES, ()):
        handle.remove()
    if hasattr(model, _HANDLES):
        delattr(model, _HANDLES)


def _gradient_mask(packed: Tensor) -> Callable[[Tensor], Tensor]:
    def mask(gradient: Tensor) -> Tensor:
        return prune_(gradient.clone(), packed.to(gradient.device))  # the caller's gradient is not ours to change

    return mask
