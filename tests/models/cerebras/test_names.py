"""ModelZoo's own list of families is the limit on a Cerebras, and is said before anything is made."""

import pytest

from sparse_ft import cli
from sparse_ft.errors import UserError
from sparse_ft.models.cerebras.names import check_convertible
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.families import ARCHITECTURES


@pytest.mark.parametrize("family", [name for name, row in ARCHITECTURES.items() if not row.modelzoo])
def test_a_family_that_modelzoo_has_not_is_one_line(family, tiny_model):
    with pytest.raises(UserError, match=f"no converter for '{family}' here; llama, mistral, mixtral are") as caught:
        check_convertible(Checkpoint(tiny_model(f"tiny-{family}")).config)
    assert "\n" not in str(caught.value)


def test_commands_say_so_before_anything_is_made(tmp_path, monkeypatch, capsys, study_file):
    monkeypatch.chdir(tmp_path)
    study = study_file({"model": ["tiny-qwen3"], "sparsity": [0.5], "mode": ["sparse_to_sparse"]})
    there = set(tmp_path.iterdir())
    model = ["--model", "tiny-qwen3", "--data_dir", "made", "--trainer", "cerebras", "--output_dir", "out"]
    assert cli.run("train", model, "train") == 2
    configs = ["--config", str(study), "--output_dir", "configs"]
    assert cli.run("cerebras_configs", configs, "cerebras_configs") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all("ModelZoo has no converter for 'qwen3' here; llama" in line for line in said)
    assert set(tmp_path.iterdir()) == there
