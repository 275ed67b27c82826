"""Block-sequential pruning, and the same thing done to a whole model in memory: the oracles of its tests."""

from functools import partial

import torch

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.loading import load_model
from sparse_ft.models.names import role, slots
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


def keep_routed(seen, experts, module, inputs, output):
    """What every expert's matrices are multiplied with, by their parameter and the expert."""
    hidden, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
    for expert in range(len(module.down_proj)):
        x = hidden[(chosen == expert).any(dim=1)]
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        seen[f"{experts}.gate_up_proj", expert] = x
        seen[f"{experts}.down_proj", expert] = module.act_fn(gate) * up


@torch.no_grad()
def in_memory(folder, text, prune):
    """Prunes a model block by block: hooks gather each block's inputs from the model as pruned so far."""
    model, checkpoint = load_model(folder, "float32", "cpu"), Checkpoint(folder)
    row, masks = architecture_of(checkpoint.config), {}
    places = slots(checkpoint.config, checkpoint.prunable)
    for block, layer in enumerate(model.get_submodule(row.blocks)):
        prefix, seen, hooks = row.block(block), {}, []
        for name, module in layer.named_modules(prefix=prefix.removesuffix(".")):
            if isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_hook(partial(keep_input, seen, f"{name}.weight")))
            elif row.experts is not None and name == f"{prefix}{row.experts.module}.experts":
                hooks.append(module.register_forward_hook(partial(keep_routed, seen, name)))
        model(input_ids=text)
        for hook in hooks:
            hook.remove()
        for name in (name for name in checkpoint.prunable if name.startswith(prefix)):
            slot, what = places[name], role(checkpoint.config, name)
            weight = slot.view(model.get_parameter(slot.parameter))
            if what.expert is None:
                x = seen[slot.parameter]
                new, kept = prune(weight, x.reshape(-1, x.shape[-1]))
            elif what.fused_experts:
                pairs = [prune(weight[expert], seen[slot.parameter, expert]) for expert in range(len(weight))]
                new, kept = (torch.stack(both) for both in zip(*pairs, strict=True))
            else:
                new, kept = prune(weight, seen[slot.parameter, what.expert])
            weight.copy_(new)
            masks[name] = kept
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
