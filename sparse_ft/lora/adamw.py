"""AdamW for weights in bfloat16 or float16, written back by dithered rounding: no step is too small to be kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_ft.lora.rounding import DITHERED_DTYPES, block_rows, dither_into, noise_key
from sparse_ft.models.sharding import own_rows

__all__ = ["DitheredAdamW"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DitheredAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) of low-precision weights.

    Torch's own rounds each new weight to the nearest: of steps below half a unit in the last place nothing is left,
    and a second moment in bfloat16 does not decay, because 0.999 of it rounds to itself. Here moments and sum are
    float32, and the weight is rounded with noise that depends on its place, the step and a seed. That takes 12 bytes
    a weight with its gradient, where a float32 copy of the weights would take 16, and nothing but the moments need
    be saved. A weight of zero without a gradient stays zero.

    Args:
        params: parameters or groups, as torch's optimizers take them; contiguous.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: of the noise.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, seed: int = 0) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; beside the moments it takes memory for a block of rows."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (group, parameter) in enumerate(places):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state.update({name: torch.zeros_like(own_rows(parameter)[0], dtype=torch.float32) for name in _MOMENTS})
            state["step"] += 1
            key = noise_key(f"optimizer {number}", self._seed) + state["step"] * 0x9E3779B9
            _update(parameter, *(state[name] for name in _MOMENTS), state["step"], group, key & 0xFFFFFFFF)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {})
            self.state[parameter].update({n: saved[n].to(parameter.device).clone() for n in _MOMENTS if n in saved})


def _update(parameter: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any], key: int) -> None:
    """One step of one parameter, a block of rows at a time; of a sharded one, of this process's rows of it."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    (own, begins), gradient = own_rows(parameter), own_rows(parameter.grad)[0].contiguous()
    columns = parameter.shape[-1] if parameter.dim() > 1 else max(1, own.numel())
    weight, gradient, m, v = (t.view(-1, columns) for t in (own, gradient, first, second))
    before = begins * math.prod(parameter.shape[1:-1])
    size = block_rows(weight)
    for begin in range(0, weight.shape[0], size):
        rows = slice(begin, begin + size)
        g = gradient[rows].float()
        m[rows].lerp_(g, 1 - beta1)
        v[rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = (v[rows] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        total = weight[rows].float().mul_(1 - lr * decay).addcdiv_(m[rows], spread, value=-lr / (1 - beta1**step))
        if weight.dtype not in DITHERED_DTYPES:
            weight[rows] = total
        elif parameter.dim() > 1:
            dither_into(weight[rows], total, key, before + begin)
        else:  # its elements are the columns of one row, of which these are some
            whole = torch.cat([total.new_zeros(1, begins), total], dim=1)
            rounded = torch.empty_like(whole, dtype=weight.dtype)
            dither_into(rounded, whole, key)
            weight[rows] = rounded[:, begins:]
