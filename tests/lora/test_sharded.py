"""Parameters sharded over processes (FSDP 2, ``fully_shard``): the same training as in one process, all zeros kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sparse_ft
from sparse_ft.lora import LoraSettings, apply_sparse_lora
from sparse_ft.masks.files import load_masks, save_masks
from sparse_ft.models.loading import load_model

KINDS = ("llama", "mixtral")


def train(kind, base, masks, out, sharded):
    """Four steps of AdamW on the same batches in every process; the first saves losses and adapters."""
    torch.manual_seed(0)
    settings = LoraSettings(lora_r=4, lora_alpha=8)
    plain = load_model(Path(base) / kind, torch.float32, "cpu")
    model = apply_sparse_lora(plain, settings, "sparse_to_sparse", load_masks(Path(masks) / f"{kind}.safetensors"))
    if sharded:
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(4):
        ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if sharded:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in trained.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"losses": torch.tensor(losses), **whole}, Path(out) / f"{kind}.pt")


@pytest.mark.slow
def test_two_sharded_processes_train_what_one_trains(tiny, make_masks, tmp_path):
    base, masks, alone, pair = (tmp_path / name for name in ("base", "masks", "1", "2"))
    for folder in (base, masks, alone, pair):
        folder.mkdir()
    for kind in KINDS:
        (base / kind).symlink_to(tiny.folder(kind))
        save_masks(make_masks(tiny(kind)), masks / f"{kind}.safetensors")
        train(kind, base, masks, alone, sharded=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sparse_ft.__file__).parents[1])}
    command = [*launch, __file__, str(base), str(masks), str(pair)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    for kind in KINDS:
        one, two = (torch.load(folder / f"{kind}.pt", weights_only=True) for folder in (alone, pair))
        assert one.keys() == two.keys() and len(one) > 1
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)


if __name__ == "__main__":  # a process of torchrun
    dist.init_process_group("gloo")
    for which in KINDS:
        train(which, *sys.argv[1:4], sharded=True)
    dist.destroy_process_group()
