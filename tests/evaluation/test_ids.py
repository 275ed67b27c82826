"""A token that was added without a row of the embedding: one line, wherever the model would meet it."""

import shutil

import pytest

from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.evaluation.perplexity import perplexity
from sparse_ft.models.loading import load_model, load_tokenizer, saved_tokenizer
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.made import made_data_dir


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("added") / "model"
    shutil.copytree(tiny_model("tiny-llama"), folder)
    tokenizer = saved_tokenizer(folder)
    assert tokenizer.add_tokens([": ", "lamp"]) == 2
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["boolq", "gsm8k"])
def test_scoring(task, folder):
    settings = ScoringSettings(eval_limit=2, perplexity_tokens=0)
    with pytest.raises(UserError, match=r"the text has token 51[23], but the model's embedding has 512 rows"):
        evaluate(
            load_model(folder, "float32", "cpu"), load_tokenizer(folder), load_task(task, made_data_dir()), settings
        )


def test_perplexity(folder):
    with pytest.raises(UserError, match="the text has token 513, but"):
        perplexity(load_model(folder, "float32", "cpu"), load_tokenizer(folder), ["Where is the lamp?"] * 40, 16)


def test_calibration(folder, tmp_path):
    config = MaskConfig(
        model=str(folder), importance="wanda", scope="row", task="gsm8k", data_dir="made", calibration_samples=4,
        calibration_seq_len=16,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the text has token 51[23], but"):
        make_masks(config, Workbench(), tmp_path / "masks")
    assert not list((tmp_path / "masks").glob("*"))
