"""Whatever family, rope setting or shape a model has, it is registered and loaded back; and whose an alias is."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from sparse_ft.models.families import ARCHITECTURES
from sparse_ft.models.loading import load_model, save_model
from sparse_ft.models.tiny import tiny_tokenizer
from sparse_ft.settings.cell import name_problem
from sparse_ft.tracking.models import log_model, register_model, resolve_model
from sparse_ft.tracking.runs import Tracker

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONG = [1.0 + 0.1 * step for step in range(8)]  # one factor for each pair of a head's 16 features
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "longrope": {"short_factor": LONG, "long_factor": LONG, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
OTHERS = {
    "a wide head": (LlamaConfig, {"head_dim": 40}),
    "a head of 8": (LlamaConfig, {"head_dim": 8}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "a padding id high up": (LlamaConfig, {"pad_token_id": 511}),
}


@pytest.fixture(scope="module")
def tracker(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    database = shutil.copyfile(empty_store, tmp_path_factory.mktemp("store") / "mlflow.db")
    return Tracker(f"sqlite:///{database}", "study")


def write(folder: Path, kind, **values) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **values}))
    return save_model(model, tiny_tokenizer(), folder)


def rope(name):
    return {"rope_parameters": {"rope_type": name, "rope_theta": 10000.0, **ROPES[name]}}


CASES = {name: (LlamaConfig, rope(name)) for name in ROPES}
CASES |= {"yarn of experts": (MixtralConfig, {**rope("yarn"), "head_dim": 16})} | OTHERS


def comes_back(folder: Path, tracker: Tracker, monkeypatch) -> str:
    """Logs and registers a checkpoint, and loads it as whoever knows mlflow alone does; its address."""
    logged = log_model(tracker, tracker.start("cell"), folder, "model")
    register_model(tracker, logged, "any", alias="sparse50", said=lambda _: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    parts = mlflow.transformers.load_model("models:/any@sparse50", return_type="components")
    truth = load_model(folder, "float32", "cpu")
    ids = torch.tensor([[1, 5, 9, 200]])
    assert torch.equal(parts["model"](ids).logits, truth(ids).logits)
    return "models:/any@sparse50"


@pytest.mark.parametrize("case", CASES)
def test_any_model_registers_and_comes_back(case: str, tracker: Tracker, tmp_path: Path, monkeypatch):
    kind, values = CASES[case]
    address = comes_back(write(tmp_path / "m", kind, **values), tracker, monkeypatch)
    answer = mlflow.pyfunc.load_model(address).predict(["Question: is it true?"])
    assert isinstance(answer[0], str)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_model_of_every_family_registers_and_comes_back(family: str, tracker: Tracker, tiny_model, monkeypatch):
    folder = tiny_model(f"tiny-{family}")
    stored = resolve_model(comes_back(folder, tracker, monkeypatch), tracker.uri)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (stored / name).read_bytes() == (folder / name).read_bytes()
    assert "transformers" in mlflow.models.Model.load(stored.parent).flavors


def test_the_old_words_for_rope_register_too(tracker: Tracker, tmp_path: Path):
    folder = write(tmp_path / "m", LlamaConfig)
    stored = json.loads((folder / "config.json").read_text())
    rope = stored.pop("rope_parameters")
    stored |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "yarn", **ROPES["yarn"]}}
    (folder / "config.json").write_text(json.dumps(stored))
    log_model(tracker, tracker.start("cell"), folder, "model")


# -- whose an alias is


def kind(method="unstructured", importance="magnitude", **more):
    return {"method": method, "importance": importance, "scope": "layer", "mode": "full", "model": "m", **more}


@pytest.fixture(scope="module")
def logged(tracker: Tracker, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write(tmp_path_factory.mktemp("alias") / "m", LlamaConfig)
    return log_model(tracker, tracker.start("cell"), folder, "model")


@pytest.mark.parametrize(
    ("other", "second"),
    [
        (kind("random", None), "sparse50_unstructured_magnitude"),
        (kind(importance="wanda"), "sparse50_unstructured_magnitude"),
        (kind(scope="global"), "sparse50_unstructured_magnitude_layer"),
        (kind(model="a/b"), "sparse50_unstructured_magnitude_m"),
        (kind(mode="sparse_to_sparse"), "sparse50_unstructured_magnitude_full"),
    ],
)
def test_an_alias_that_goes_to_another_kind_says_so_and_leaves_one_behind(other, second, tracker, logged):
    name, said, client = f"both-{second}-{other['importance']}", [], tracker.client
    register_model(tracker, logged, name, alias="sparse50", tags=kind(), said=said.append)
    assert said == []
    register_model(tracker, logged, name, alias="sparse50", tags=other, said=said.append)
    assert len(said) == 1 and "\n" not in said[0] and f"models:/{name}@{second}" in said[0]
    before = client.get_model_version_by_alias(name, second)
    assert (before.version, before.tags["alias_before"]) in {("1", "sparse50"), (1, "sparse50")}
    assert str(client.get_model_version_by_alias(name, "sparse50").version) == "2"


def test_an_alias_that_moves_within_a_kind_is_silent(tracker, logged):
    said = []
    for accuracy in (0.5, 0.6):
        tags = kind() | {"accuracy": accuracy}
        register_model(tracker, logged, "same", alias="sparse50", tags=tags, said=said.append)
    assert said == [] and set(tracker.client.get_registered_model("same").aliases) == {"sparse50"}


@pytest.mark.parametrize("name", ["a", "boolq-sparse", "Modèle 7.B", "a_b.c-d", "x" * 250])
def test_names_that_the_registry_takes(name, tracker, logged):
    assert name_problem(name) is None
    register_model(tracker, logged, name, alias="sparse50")
    assert tracker.client.get_model_version_by_alias(name, "sparse50")


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a@b", "a#b", "a?b", "a%2Fb", "a\\b", "a\nb", ".", "..", " a"])
def test_names_that_it_does_not(name):
    assert "register_as" in name_problem(name)


def test_stray_weights_are_not_logged(tracker: Tracker, tmp_path: Path):
    folder = write(tmp_path / "m", LlamaConfig)
    shutil.copy(folder / "model.safetensors", folder / "model_old.safetensors")
    address = log_model(tracker, tracker.start("cell"), folder, "model")
    stored = resolve_model(address, tracker.uri)
    assert (stored / "model.safetensors").is_file() and not (stored / "model_old.safetensors").exists()
