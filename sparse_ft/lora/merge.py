"""Adapters merged into their weights: in place, one after another, with nothing kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.errors import UserError
from sparse_ft.lora.experts import expert_factors
from sparse_ft.lora.full import release_masked_weights
from sparse_ft.lora.function import effective_weight
from sparse_ft.lora.layer import MaskedBase
from sparse_ft.lora.rounding import DITHERED_DTYPES, noise_key
from sparse_ft.progress import SILENT, Progress
from sparse_ft.settings.shared import ROUNDINGS

__all__ = ["adapted_layers", "adapted_parameter", "merge_all_lora_weights", "merge_layers", "refuse_shared"]


def merge_all_lora_weights(
    model: nn.Module, rounding: str = "dithered", seed: int = 0, progress: Progress = SILENT
) -> PreTrainedModel:
    """The trained model as a plain transformers model: adapters merged, nothing of PEFT left.

    In ``sparse_to_sparse`` each weight is written by the arithmetic of the forward pass, so the logits stay the same
    to the bit. A dense adapter's sum is made in float32 and rounded once, with dither where that is asked for. Works
    in place, layer by layer, with memory for a part of one beside the weights (rounded to the nearest, for one); a
    model without adapters comes back as it is.

    Args:
        model: a model with adapters of any kind.
        rounding: of plain PEFT adapters in bfloat16 or float16: dithered or nearest. Adapters of a
            `SparseLoRAConfig` know their own.
        seed: of the dithered rounding of plain adapters.
        progress: told about the layers.

    Raises:
        UserError: an adapter on a weight that another module uses too, or a rounding that there is not; nothing was
            changed.
        ValueError: a merged weight is not finite.
    """
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding is '{rounding}', it must be one of {', '.join(ROUNDINGS)}.")
    model = getattr(model, "module", model)  # of DistributedDataParallel
    if isinstance(model, PeftModel):
        refuse_shared(model.get_base_model())
        merge_layers(list(adapted_layers(model)), rounding, seed, progress)
        model = model.unload()
    release_masked_weights(model)
    return model


def merge_layers(
    layers: Sequence[tuple[str, BaseTunerLayer]], rounding: str, seed: int, progress: Progress = SILENT
) -> None:
    """Merges adapters into their weights, in place, where they are not merged yet.

    Args:
        layers: by the names that `adapted_layers` gives.
        rounding: as `merge_all_lora_weights` takes it.
        seed: as there.
        progress: told of every layer.

    Raises:
        ValueError: a merged weight is not finite.
    """
    progress.start("merge", len(layers), "layers")
    for name, layer in layers:
        if not layer.merged:
            _merge(layer, noise_key(name, seed) if rounding == "dithered" else None)
        weight = adapted_parameter(layer).detach()
        if not all(torch.isfinite(block).all() for block in weight.reshape(-1).split(1 << 18)):
            raise ValueError(f"the merged weights of {name} are not finite; did training diverge?")
        progress.advance()
    progress.stop()


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers that carry adapters, by the name of the parameter they adapt, in the plain model."""
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}", layer


def refuse_shared(plain: nn.Module, config: LoraConfig | None = None) -> None:
    """Refuses adapters on a weight that several modules share: merged, they would change what was not adapted.

    Args:
        plain: the model, with its adapters on, or
        config: what is about to be put on it.

    Raises:
        UserError: naming the weight.
    """
    names = [(name, id(weight)) for name, weight in plain.named_parameters(remove_duplicate=False)]
    users = Counter(weight for _, weight in names)
    for name, weight in names:
        if users[weight] == 1:
            continue
        path = name.rpartition(".")[0]
        if config is None:
            adapted = path.endswith((".base_layer", ".original_module"))
        else:
            saved = any(f".{path}".endswith(f".{wanted}") for wanted in config.modules_to_save or ())
            named = any(f".{name}".endswith(f".{wanted}") for wanted in config.target_parameters or ())
            chosen = config.target_modules not in (None, "all-linear")  # neither reaches embeddings or the head
            adapted = saved or named or (chosen and bool(check_target_module_exists(config, path)))
        if adapted:
            own = path.removesuffix(".base_layer").removesuffix(".original_module")
            others = sorted(
                other.replace(".base_layer", "") for other, same in names if same == weight and other != name
            )
            raise UserError(
                f"{own} shares its weight with {', '.join(others)}: an adapter on it cannot be merged without changing"
                " both; leave it out of target_modules (and modules_to_save)."
            )


@torch.no_grad()
def _merge(layer: BaseTunerLayer, key: int | None) -> None:
    """Merges a layer's active adapter in place; ``key``: of the dithered rounding of a plain adapter."""
    names = peft_layer.check_adapters_to_merge(layer, None)
    masked = isinstance(layer, MaskedBase)
    if masked:
        layer.required_mask()
    if len(names) == 1 and names[0] in layer.lora_A:
        (name,) = names
        if masked:
            key = layer.rounding_key(name)
        weight = adapted_parameter(layer).data
        if masked and layer.is_masked(name):
            layer.effective_weight(name, out=weight)
            layer.merged_adapters.append(name)
            return
        factors = _factors(layer, name)
        if key is not None and weight.dtype in DITHERED_DTYPES and factors is not None:
            effective_weight(weight, *factors, None, layer.scaling[name], key, out=weight)
            layer.merged_adapters.append(name)
            return
    layer.merge()  # PEFT adds the product, made in float32, to the weight in place


def adapted_parameter(layer: BaseTunerLayer) -> Tensor:
    """The weight that a layer's adapters change."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def _factors(layer: BaseTunerLayer, name: str) -> tuple[Tensor, Tensor] | None:
    """``A`` and ``B`` where the adapter is their product and nothing else."""
    if isinstance(layer, MaskedBase):
        return layer.factors(name)
    if isinstance(layer, peft_layer.ParamWrapper):
        return expert_factors(layer, name)
    plain = isinstance(layer, peft_layer.Linear) and name not in layer.lora_variant and not layer.lora_bias[name]
    return (layer.lora_A[name].weight, layer.lora_B[name].weight) if plain and not layer.fan_in_fan_out else None
