"""Block-sequential pruning, and the same thing done to a whole model in memory: the oracles of its tests."""

from functools import partial

import torch

from sparse_ft.models.loading import load_model
from sparse_ft.pruning import Calibration, MaskGenerator, PruningSettings
from sparse_ft.pruning.alps import alps
from sparse_ft.pruning.hessian import damping_for, normalise
from sparse_ft.pruning.sparsegpt import inverse_factor, prune_columns
from sparse_ft.pruning.swaps import swap_weights


def generate(folder, text, out, progress=None, **how):
    settings = PruningSettings(dtype="float32", **how)
    how = {"progress": progress} if progress else {}
    generator = MaskGenerator(folder, settings, Calibration(text, {"task": "noise"}), **how)
    return generator, generator.generate(out, figures="none")


def keep_input(seen, name, module, inputs, output):
    seen[name] = inputs[0]


@torch.no_grad()
def in_memory(folder, text, prune):
    """Prunes a llama block by block: hooks gather each block's inputs from the model as pruned so far."""
    model = load_model(folder, "float32", "cpu")
    masks = {}
    for block, layer in enumerate(model.model.layers):
        seen, hooks = {}, []
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_hook(partial(keep_input, seen, name)))
        model(input_ids=text)
        for hook in hooks:
            hook.remove()
        for name, x in seen.items():
            weight = layer.get_submodule(name).weight
            new, kept = prune(weight, x.reshape(-1, x.shape[-1]))
            weight.copy_(new)
            masks[f"model.layers.{block}.{name}.weight"] = kept
    return model, masks


def rows_of_wanda(sparsity):
    def prune(weight, x):
        scores = weight.abs() * x.norm(dim=0)
        order = scores.argsort(dim=1, stable=True)[:, : round(sparsity * weight.shape[1])]
        kept = torch.ones_like(weight, dtype=torch.bool).scatter(1, order, False)
        return weight * kept, kept

    return prune


def rows_of_wanda_and_swaps(sparsity):
    def prune(weight, x):
        _, kept = rows_of_wanda(sparsity)(weight, x)
        better, _ = swap_weights(weight.detach(), kept, x.T @ x)
        return weight * better, better

    return prune


def layers_of_sparsegpt(sparsity):
    def prune(weight, x):
        factor, dead, _ = inverse_factor(x.T @ x)
        return prune_columns(weight, factor, dead, k=round(sparsity * weight.numel()))

    return prune


def layers_of_alps(sparsity):
    def prune(weight, x):
        hessian = normalise(x.T @ x, damping_for(*x.shape))
        return alps(weight, hessian, k=round(sparsity * weight.numel()))

    return prune


def agreement(masks, oracle):
    same = sum(int((masks[name] == oracle[name]).sum()) for name in oracle)
    return same / sum(mask.numel() for mask in oracle.values())
