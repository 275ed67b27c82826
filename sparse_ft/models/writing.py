"""A Hugging Face checkpoint written tensor by tensor, by whoever never has the whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparse_ft.files import atomic_folder, write_json

__all__ = ["ModelWriter"]

_SHARD_BYTES = 2_000_000_000  # of one file, as `sparse_ft.models.loading.save_model` has them


class ModelWriter:
    """Takes tensors in any order and writes each file when all of its tensors are there; a context.

    The folder appears when the block ends well.

    Args:
        folder: to be written; an earlier checkpoint there is replaced.
        sizes: bytes of every tensor that will come, in about the order of their coming.
        shard_bytes: of one file; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], shard_bytes: int = _SHARD_BYTES):
        self._target, self._block = folder, ExitStack()
        self._sizes, self._number, filled = dict(sizes), {}, 0
        number = 1
        for name, size in sizes.items():
            if filled and filled + size > shard_bytes:
                number, filled = number + 1, 0
            self._number[name] = number
            filled += size
        self._files = number
        self._waiting: dict[int, dict[str, Tensor]] = {n: {} for n in range(1, number + 1)}

    def __enter__(self) -> ModelWriter:
        self._folder = self._block.enter_context(atomic_folder(self._target))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, trace)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor, and a copy of it where it lies on a device or will change."""
        number = self._number[name]
        waiting = self._waiting[number]
        waiting[name] = tensor.to("cpu", copy=True).contiguous()
        if len(waiting) == sum(other == number for other in self._number.values()):
            save_file(waiting, self._folder / self._file(number), metadata={"format": "pt"})
            (self._folder / self._file(number)).chmod(0o644)
            self._waiting[number] = {}

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes what belongs to the weights: index, configuration, and tokenizer.

        Raises:
            ValueError: tensors that were announced have not come.
        """
        if lost := [name for waiting in self._waiting.values() for name in waiting]:
            raise ValueError(f"the checkpoint is not complete: beside {lost[0]} others are missing")
        if self._files > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": {name: self._file(number) for name, number in sorted(self._number.items())},
            }
            write_json(self._folder / SAFE_WEIGHTS_INDEX_NAME, index)
        model.config.dtype = model.dtype
        own = (kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        model.config.architectures = [next(own)]
        model.config.save_pretrained(self._folder)
        if model.can_generate():
            model.generation_config.save_pretrained(self._folder)
        tokenizer.save_pretrained(self._folder)

    def _file(self, number: int) -> str:
        if self._files == 1:
            return SAFE_WEIGHTS_NAME
        return SAFE_WEIGHTS_NAME.replace(".safetensors", f"-{number:05d}-of-{self._files:05d}.safetensors")
