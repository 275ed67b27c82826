"""README: short enough to be read, its Python runs as it stands."""

import re

import pytest
import torch
from documents import ROOT, blocks, section, text
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments

from sparse_ft import load_masks

WIDE = 105  # characters of a row that GitHub shows without wrapping it


def test_its_length_and_the_width_of_its_tables():
    lines = text("README.md").splitlines()
    assert len(lines) <= 120
    assert max(len(line) for line in lines if line.startswith("|")) <= WIDE


def test_five_lines_prune_tune_merge_and_prove(tiny_model, tmp_path, monkeypatch):
    (body,) = blocks("README.md", "python")
    statements = [line for line in body.splitlines() if not line.startswith("import")]
    assert len(statements) == 5
    monkeypatch.chdir(tmp_path)
    folder = tiny_model("tiny-llama")
    ids = list(range(5, 37))
    given = {
        "folder": folder,
        "rows": [{"input_ids": ids, "labels": ids}] * 8,
        "arguments": TrainingArguments("trained", max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "Trainer": Trainer,
    }
    exec(compile(body, "README.md", "exec"), given)
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    (file,) = (tmp_path / "masks").glob("*.safetensors")
    masks = load_masks(file)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert not any(new[name][~masks[name]].any() for name in masks)
    assert not all(torch.equal(old[name][masks[name]], new[name][masks[name]]) for name in masks)  # it was trained


@pytest.mark.parametrize("name", ["modern", "small_gpu", "published"])
def test_the_sizes_it_gives_are_those_of_the_studies(name):
    """What README says of a study's disk, its file says too."""
    said = re.search(rf"`configs/{name}.yaml`.*\| (.*) \|$", section("README.md", "Which GPU"), re.MULTILINE)[1]
    assert said in (ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8")
