"""Running a model block by block: one block in memory, the hidden states on disk.

What each block is called with is recorded from the model itself, so that no argument is named here: blocks of one model
may have masks and rotary tables of their own. What goes into each weight is seen by watching
``torch.nn.functional.linear``, which tells the experts of a fused 3-D parameter apart by their address and needs no
knowledge of the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import architecture_of
from sparse_ft.models.loading import load_state_into, quiet_transformers
from sparse_ft.models.names import Slot, role, slots
from sparse_ft.models.skeleton import model_config

__all__ = ["BlockModel", "HiddenStates", "InputWatch", "Target", "sample_batches"]

_BATCH_TOKENS = 2048  # tokens that go through a block at once


class Target(Protocol):
    """Takes what leaves a block, some samples at a time."""

    def write(self, samples: slice, values: torch.Tensor) -> None: ...


class HiddenStates:
    """Hidden states ``[samples, seq_len, hidden]`` in a file; a part of them is in memory at a time.

    Attributes:
        values: all of them, mapped.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype):
        self.path, self.shape = path, shape
        size = shape[0] * shape[1] * shape[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.values = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def read(self, samples: slice, device: torch.device) -> torch.Tensor:
        return self.values[samples].to(device, copy=True)

    def write(self, samples: slice, values: torch.Tensor) -> None:
        self.values[samples] = values.to("cpu")


def sample_batches(samples: int, seq_len: int) -> list[slice]:
    """Runs of samples that go through a block together: about 2,048 tokens."""
    step = max(1, _BATCH_TOKENS // seq_len)
    return [slice(first, min(first + step, samples)) for first in range(0, samples, step)]


class _Captured(Exception):
    """Stops the model at its last block."""


class BlockModel:
    """A model's skeleton without weights, from which one block at a time is made whole.

    Args:
        checkpoint: where the weights come from.
        dtype, device: of the computation.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.family = architecture_of(checkpoint.config)
        config, attention = model_config(checkpoint.folder), self.family.attention
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            # eager experts: one matrix product per expert, which is what InputWatch can tell apart
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation="eager"
            ).eval()
        self.model.requires_grad_(False)
        self.slots = slots(checkpoint.config, checkpoint.prunable)
        self._calls: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}  # of every block, by the number of samples

    @property
    def count(self) -> int:
        return len(self._blocks)

    @property
    def _blocks(self) -> torch.nn.ModuleList:
        return self.model.get_submodule(self.family.blocks)

    def names(self, block: int) -> list[str]:
        """Prunable tensors of a block."""
        return [name for name in self.checkpoint.prunable if role(self.checkpoint.config, name).block == block]

    @torch.no_grad()
    def embed(self, token_ids: torch.Tensor, path: Path) -> HiddenStates:
        """What the first block receives, written to ``path``."""
        ids = token_ids.to(self.device)
        shape = (*token_ids.shape, self.model.config.hidden_size)
        states = HiddenStates(path, shape, self.dtype)
        for samples in sample_batches(*states.shape[:2]):
            hidden = self._capture(ids[samples])
            states.write(samples, hidden)
        return states

    def prepare(self, token_ids: torch.Tensor) -> None:
        """Records the other arguments of the blocks' calls, when `embed` is not needed (resumed runs)."""
        for samples in sample_batches(*token_ids.shape):
            self._capture(token_ids[samples].to(self.device))

    def call(self, block: int, samples: int, seq_len: int) -> tuple[tuple, dict[str, Any]]:
        """The other arguments of a block's call with the hidden states of so many samples."""
        if samples not in self._calls:  # they hang on the shape alone: there is no padding
            self._capture(torch.zeros(samples, seq_len, dtype=torch.int64, device=self.device))
        return self._calls[samples][block]

    def load(self, block: int) -> torch.nn.Module:
        """Makes a block whole: its weights from the checkpoint, on the device."""
        module = self._blocks[block]
        _allocate(module, self.device)
        prefix = self.family.block(block)
        load_state_into(self.model, self.checkpoint, [n for n in self.checkpoint.names if n.startswith(prefix)])
        return module

    def unload(self, block: int) -> None:
        _allocate(self._blocks[block], torch.device("meta"))

    def weight(self, name: str) -> torch.Tensor:
        """The tensor ``name`` inside the loaded block: a view, to be read or written."""
        slot: Slot = self.slots[name]
        return slot.view(self.model.get_parameter(slot.parameter).detach())

    def address(self, name: str) -> int:
        """Where the matrix lies that inputs are multiplied with: a whole parameter, or one expert's part."""
        slot = self.slots[name]
        parameter = self.model.get_parameter(slot.parameter)
        return (parameter[slot.index[0]] if slot.index else parameter).data_ptr()

    @torch.no_grad()
    def run(
        self,
        block: int,
        states: HiddenStates,
        target: Target | None = None,
        watch: InputWatch | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Sends hidden states through a loaded block; writes what comes out to ``target``."""
        module = self._blocks[block]
        for samples in sample_batches(*states.shape[:2]):
            hidden = states.read(samples, self.device)
            arguments, keywords = self.call(block, *hidden.shape[:2])
            if watch is None:
                result = module(hidden, *arguments, **keywords)
            else:
                with watch:
                    result = module(hidden, *arguments, **keywords)
            if target is not None:
                target.write(samples, result[0] if isinstance(result, tuple) else result)
            if advance is not None:
                advance(len(hidden))

    @torch.no_grad()
    def _capture(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block receives; records what else every block is called with."""
        base = self.model.get_submodule(self.family.decoder)
        embedding = base.get_submodule(self.family.embedding)
        if next(embedding.parameters()).is_meta:
            _allocate(embedding, self.device)
            load_state_into(self.model, self.checkpoint, [self.family.embedding_weight])
            for child in base.children():  # the rotary table and the like: small, and not in the checkpoint
                if not list(child.parameters()):
                    child.to(self.device)
        seen: list[torch.Tensor] = []
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def record(*arguments: Any, **keywords: Any) -> torch.Tensor:
            """Stands for a block, which has no weights here, and hands on what it receives."""
            rest = dict(keywords)
            hidden = arguments[0] if arguments else rest.pop("hidden_states")
            seen.append(hidden)
            calls.append((arguments[1:], rest))
            if len(calls) == self.count:
                raise _Captured
            return hidden

        for block in self._blocks:
            block.forward = record
        try:
            base(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            for block in self._blocks:
                del block.forward
        self._calls[len(ids)] = calls
        return seen[0]


def _allocate(module: torch.nn.Module, device: torch.device) -> None:
    """Memory for a module's parameters on the device (``meta``: none), without their values; buffers keep theirs."""
    for name, parameter in module.named_parameters():
        if parameter.device.type != device.type:
            set_module_tensor_to_device(module, name, device, value=torch.empty_like(parameter, device=device))
    if device.type != "meta":
        for name, buffer in module.named_buffers():
            set_module_tensor_to_device(module, name, device, value=buffer)


class InputWatch(TorchFunctionMode):
    """Sums up what is multiplied with each watched weight.

    Args:
        model: with the block loaded.
        names: checkpoint tensors to watch.
        hessians: also sum up x x^T.

    Attributes:
        squares: sums of squares of each input feature, float64 ``[C]``, by name.
        hessians: x^T x, float32 ``[C, C]``, likewise; shared by matrices with the same input.
        tokens: how many tokens went through, likewise.
    """

    def __init__(self, model: BlockModel, names: list[str], hessians: bool = False):
        super().__init__()
        self._matrices: dict[int, list[str]] = {}
        self._columns = {name: model.weight(name).shape[-1] for name in names}
        for name in names:
            self._matrices.setdefault(model.address(name), []).append(name)
        self._device = model.device
        self._with_hessians = hessians
        self._owner: dict[str, str] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._hessians: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            names = self._matrices.get(weight.data_ptr())
            if names:
                self._see(names, args[0] if args else kwargs["input"])
        return function(*args, **kwargs)

    def input_norm(self, name: str) -> torch.Tensor:
        """Euclidean norm of each input feature, float32 ``[C]``; 0 if unseen."""
        squares = self._squares.get(self.owner(name))
        if squares is None:
            return torch.zeros(self._columns[name], device=self._device)
        return squares.sqrt().float()

    def tokens(self, name: str) -> int:
        return self._tokens.get(self.owner(name), 0)

    def hessian(self, name: str) -> torch.Tensor | None:
        """x^T x over all tokens, float32 ``[C, C]``; None if no token came. Shared: not to be modified."""
        return self._hessians.get(self.owner(name))

    def owner(self, name: str) -> str:
        """The matrix under which the inputs of this one are kept; the same for those that share an input."""
        return self._owner.get(name, name)

    def _see(self, names: list[str], x: torch.Tensor) -> None:
        first = names[0]
        if first not in self._owner:
            # q, k and v (gate and up) are given one and the same tensor: its sums are kept once
            shared = self._last is not None and self._last[0] is x
            for name in names:
                self._owner[name] = self._owner[self._last[1]] if shared else first
        self._last = (x, first)
        owner = self._owner[first]
        if owner != first:
            return
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        squares = rows.square().sum(0).double()
        self._tokens[owner] = self._tokens.get(owner, 0) + len(rows)
        self._squares[owner] = self._squares[owner] + squares if owner in self._squares else squares
        if self._with_hessians:
            total = self._hessians.setdefault(owner, rows.new_zeros(rows.shape[1], rows.shape[1]))
            total.addmm_(rows.T, rows)
