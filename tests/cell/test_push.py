"""A cell's model goes to a hub, over HTTP, once it has been proved: private, with masks and card."""

import shutil

import huggingface_hub.constants
import pytest
import yaml
from hub import hub_server
from safetensors.torch import load_file, save_file

from sparse_ft.cli import run as command
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.tracking.runs import Tracker

CELL = {"model": "tiny-llama", "data_dir": "made", "max_steps": 1, "batch_size": 2, "lora_r": 2, "sparsity": 0.5,
        "eval_limit": 2, "perplexity_tokens": 0, "recover_steps": 1, "recover_batch_size": 1, "recover_seq_len": 16,
        "teacher": "dense"}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a hub that asks for a token; the client's constants point there."""
    (tmp_path / "hub" / "models").mkdir(parents=True)
    with hub_server(tmp_path / "hub", token="secret") as (address, _):
        for name, value in {"ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield tmp_path / "hub" / "models"


@pytest.fixture
def trained(tmp_path):
    """Runs a cell; returns its run."""

    def run(**values):
        words = [part for name, value in (CELL | values).items() for part in (f"--{name}", str(value))]
        assert command("train", [*words, "--output_dir", str(tmp_path / "cell")], "train") == 0
        return Tracker().search("tags.kind = 'cell'")[-1]

    return run


def push(run, *more):
    return command("push", ["--run", run.run_id, "--to", "lab/tiny", *more], "push")


@pytest.mark.slow
def test_checkpoint_masks_and_card_are_pushed_once_they_are_proved(hub, trained, monkeypatch, capsys, tmp_path):
    run = trained(register_as="tiny")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert push(run) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "the hub refuses lab/tiny" in refused and "hf auth login, or HF_TOKEN" in refused
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert push(run) == 0
    assert "pushed: lab/tiny (private)" in capsys.readouterr().out
    folder = hub / "lab" / "tiny"
    assert Checkpoint(folder).is_called(run.tags["merged_fingerprint"]) and (folder / "tokenizer.json").is_file()
    (masks,) = (folder / "masks").iterdir()
    assert command("validate", ["--checkpoint", str(folder), "--masks", str(masks)], "validate") == 0
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "tiny-llama"
    for said in ("## Data", "| trained on | boolq |", "## Recovery", "| steps | 1 |", "| corpus | task |", "## Teacher",
                 "| teacher | dense |", 'from_pretrained("lab/tiny")', "| after the merge | 0.5 |"):  # fmt: skip
        assert said in text, said
    assert Tracker().run(run.run_id).tags["pushed_to"].startswith("lab/tiny@")

    # Again, into what is there by now; not into what others see.
    assert push(run) == 0
    (hub / "open" / "tiny").mkdir(parents=True)
    assert push(run, "--to", "open/tiny") == 2
    assert "open/tiny is on the hub and public; add --private false" in capsys.readouterr().err
    assert push(run, "--to", "open/tiny", "--private", "false") == 0 and (hub / "open/tiny/config.json").is_file()


def test_what_does_not_obey_its_masks_stays_here(hub, trained, capsys, tmp_path, monkeypatch):
    run = trained(keep="all", recover_steps=0, teacher="none")
    merged = tmp_path / "cell" / "merged"
    other = shutil.copytree(merged, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    fingerprint = Checkpoint(other).fingerprint
    Tracker().log(run.run_id, tags={"model_folder": str(other), "merged_fingerprint": fingerprint})
    assert push(run) == 1
    assert "not pushed: the checkpoint does not obey its masks" in capsys.readouterr().out
    assert not (hub / "lab").exists()


def test_what_cannot_be_pushed_is_one_line(hub, trained, capsys):
    run = trained(mode="sparse_to_dense", recover_steps=0, teacher="none")
    assert push(run) == 2
    assert "is of mode sparse_to_dense, whose merged model is dense" in capsys.readouterr().err
    assert command("push", ["--run", run.run_id, "--to", "tiny"], "push") == 2
    assert "to is 'tiny'; it must be owner/name" in capsys.readouterr().err
    assert command("push", ["--run", "f" * 32, "--to", "lab/tiny"], "push") == 2
