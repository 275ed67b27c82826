"""The Hugging Face Trainer, unchanged: accumulation, resume to the bit, several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import sparse_ft
from sparse_ft.lora import LoraSettings, apply_sparse_lora, merge_all_lora_weights, validate_sparsity_preserved
from sparse_ft.masks.files import load_masks, save_masks
from sparse_ft.models.loading import load_model

SETTINGS = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.1)


def rows(count=16):
    ids = torch.randint(3, 500, (count, 12), generator=torch.Generator().manual_seed(8))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "logging_strategy": "no",
        **options,
    }
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows())


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sparse_to_sparse", "full"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
def test_resuming_from_a_trainer_checkpoint_is_bit_identical(mode, bf16, tiny, make_masks, tmp_path, work):
    masks = make_masks(tiny("llama"))

    def fresh():
        torch.manual_seed(5)
        return apply_sparse_lora(tiny("llama"), SETTINGS, mode, masks)

    through = fresh()
    trainer(through, tmp_path / "through", bf16=bf16).train()
    first = fresh()
    trainer(first, tmp_path / "first", max_steps=3, bf16=bf16, lr_scheduler_type="constant").train()
    # The checkpoint at step 3 of the uninterrupted run, taken up by a new process' worth of objects.
    resumed = fresh()
    trainer(resumed, tmp_path / "resumed", bf16=bf16).train(str(tmp_path / "through" / "checkpoint-3"))
    one, other = adapter(through), adapter(resumed)
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], value) for name, value in adapter(first).items())
    assert validate_sparsity_preserved(resumed, masks) == {}
    trained = work.logits(resumed.eval())  # the Trainer leaves the model computing in autocast
    merged = merge_all_lora_weights(resumed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(work.logits(merged).float(), trained)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(kind, tiny, make_masks, work):
    masks = make_masks(tiny(kind))
    model = apply_sparse_lora(tiny(kind), LoraSettings(lora_r=4, lora_alpha=8), "sparse_to_sparse", masks).train()
    whole = work.batch(rows=4)
    model(**whole).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model(**{key: value[half] for key, value in whole.items()}).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_checkpointed_gradients_are_those_without_checkpointing(kind, tiny, make_masks, work):
    masks = make_masks(tiny(kind))
    model = apply_sparse_lora(tiny(kind), LoraSettings(lora_r=4, lora_alpha=8), "sparse_to_sparse", masks)
    work.steps(model)
    gradients = []
    for reentrant in (None, True, False):
        model.train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**work.batch(5)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for other in gradients[1:]:
        assert all(torch.equal(other[name], value) for name, value in gradients[0].items())


def train_both_modes(base, masks, out, processes):
    """Trains in modes sparse_to_sparse and full; the main process saves what became of the parameters."""
    for mode in ("sparse_to_sparse", "full"):
        torch.manual_seed(0)
        settings = LoraSettings(lora_r=4, lora_alpha=8)
        model = apply_sparse_lora(load_model(base, torch.float32, "cpu"), settings, mode, load_masks(masks))
        options = {"per_device_train_batch_size": 4 // processes, "train_sampling_strategy": "sequential"}
        if processes > 1:
            options["ddp_backend"] = "gloo"
        run = trainer(model, out, max_steps=4, learning_rate=1e-3, save_strategy="no", max_grad_norm=0.0, **options)
        run.train()
        assert run.args.world_size == processes
        if run.is_world_process_zero():
            torch.save(adapter(model), Path(out) / f"{mode}.pt")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny, make_masks, tmp_path):
    """DistributedDataParallel over gloo on a CPU, by torchrun: the same batches, split in two."""
    masks = save_masks(make_masks(tiny("llama")), tmp_path / "masks.safetensors")
    base, alone, pair = tiny.folder("llama"), tmp_path / "1", tmp_path / "2"
    alone.mkdir(), pair.mkdir()
    train_both_modes(base, masks, alone, 1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sparse_ft.__file__).parents[1])}
    command = [*launch, __file__, str(base), str(masks), str(pair), "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    for mode in ("sparse_to_sparse", "full"):
        one, two = (torch.load(folder / f"{mode}.pt", weights_only=True) for folder in (alone, pair))
        assert one.keys() == two.keys() and one
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)


if __name__ == "__main__":  # a process of torchrun
    train_both_modes(*sys.argv[1:4], int(sys.argv[4]))
