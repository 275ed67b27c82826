"""The papers' own pruning code, run on a model and text of ours.

The repositories are the reader's clones of github.com/locuslab/wanda (which drives all three methods) and of
github.com/IST-DASLab/sparsegpt (whose class SparseGPT is put in). Neither is changed; what follows only bridges from
the transformers of 2023 and a GPU to today's and to any device.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

__all__ = ["prune_as_published"]


def prune_as_published(
    model,
    token_ids: torch.Tensor,
    importance: str,
    sparsity: float,
    n_m: tuple[int, int] | None,
    wanda: Path,
    sparsegpt: Path,
) -> None:
    """Prunes ``model`` in place with the code of the two clones.

    Args:
        model: a LLaMA with its weights on the CPU.
        token_ids: int64 ``[samples, seq_len]``, the calibration text.
        importance: ``magnitude`` (per layer), ``wanda`` (per row) or ``sparsegpt``.
        n_m: (pruned, group) of an N:M pattern, as their code counts: N of every M go.
    """
    n, m = n_m or (0, 0)
    arguments = Namespace(nsamples=len(token_ids), seed=0, sparsity_ratio=sparsity, use_variant=False)
    prune = _module("lib.prune", wanda)
    model.seqlen, model.hf_device_map = token_ids.shape[1], {}
    loader = [(row[None], None) for row in token_ids]
    with (
        _positions(model),
        mock.patch.object(prune, "get_loaders", lambda *_, **__: (loader, None)),
        mock.patch.object(prune, "SparseGPT", _sparsegpt(sparsegpt)),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
        mock.patch.object(torch.Tensor, "cuda", lambda self: self),
        torch.no_grad(),
    ):
        function = getattr(prune, f"prune_{importance}")
        function(arguments, model, None, torch.device("cpu"), prune_n=n, prune_m=m)


def _module(name: str, folder: Path):
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def _sparsegpt(folder: Path) -> type:
    original = _module("sparsegpt", folder).SparseGPT

    class SparseGPT(original):
        def fasterprune(self, sparsity, prune_n=0, prune_m=0, **rest):  # the wanda clone spells the names so
            super().fasterprune(sparsity, prunen=prune_n, prunem=prune_m, **rest)

    return SparseGPT


@contextmanager
def _positions(model) -> Iterator[None]:
    """Gives each block the rotary table that today's blocks are called with and theirs of 2023 were not."""

    def fill(_, arguments, keywords):
        if keywords.get("position_embeddings") is None:
            keywords["position_embeddings"] = model.model.rotary_emb(arguments[0], keywords["position_ids"])
        return arguments, keywords

    handles = [layer.register_forward_pre_hook(fill, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
