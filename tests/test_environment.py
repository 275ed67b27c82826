"""What a launcher leaves in the environment reaches neither training nor scoring, and is there again afterwards."""

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from sparse_ft.environment import arithmetic_variables, one_process
from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.settings.training import TrainingSettings
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.examples import Example
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.training import train

LEFT = [
    {"PMI_SIZE": "4"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    {"LOCAL_RANK": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_DYNAMO_BACKEND": "EAGER"},
    {"ACCELERATE_USE_FSDP": "true"},
    {"ACCELERATE_USE_DEEPSPEED": "true"},
    {"ACCELERATE_TORCH_DEVICE": "meta"},
]


def _trained(folder, tmp_path):
    model = load_model(folder, "float32", "cpu")
    examples = [Example(list(range(1, 12)), 9), Example(list(range(20, 33)), 10)] * 4
    result = train(model, examples, TrainingSettings(max_steps=2, batch_size=2, learning_rate=0.01), tmp_path)
    return result, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("variables", LEFT, ids=lambda variables: next(iter(variables)))
def test_training_is_the_same_whatever_a_launcher_left(variables, tiny_model, tmp_path, monkeypatch):
    expected, weights = _trained(tiny_model("tiny-llama"), tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result, found = _trained(tiny_model("tiny-llama"), tmp_path)
    assert result.loss_curve == expected.loss_curve
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert {name: os.environ[name] for name in variables} == variables


@pytest.mark.parametrize("variables", LEFT, ids=lambda variables: next(iter(variables)))
def test_scores_are_the_same_whatever_a_launcher_left(variables, tiny_model, monkeypatch):
    settings = ScoringSettings(eval_limit=4, perplexity_tokens=128, perplexity_seq_len=64)

    def scored():
        model = load_model(tiny_model("tiny-llama"), "float32", "cpu")
        task = load_task("boolq", made_data_dir())
        found = evaluate(model, load_tokenizer(tiny_model("tiny-llama")), task, settings)
        return {name: value for name, value in found.metrics.items() if name != "samples_per_second"}, found.protocol

    expected = scored()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert scored() == expected
    assert {name: os.environ[name] for name in variables} == variables


def test_a_state_made_before_does_not_leak_and_is_given_back(monkeypatch):
    AcceleratorState._reset_state(True)
    before = Accelerator(mixed_precision="bf16", cpu=True).state
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with one_process():
        assert not PartialState._shared_state
        assert Accelerator(cpu=True).mixed_precision == "no"
        os.environ["ACCELERATE_USE_CPU"] = "true"  # as the Trainer does for its own
    assert "ACCELERATE_USE_CPU" not in os.environ
    assert before.mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


def test_variables_are_given_back_after_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(KeyError), one_process():
        assert "WORLD_SIZE" not in os.environ
        raise KeyError
    assert os.environ["WORLD_SIZE"] == "8"


def test_what_changes_arithmetic_and_cannot_be_hidden_is_named(monkeypatch):
    assert arithmetic_variables() == {}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert arithmetic_variables() == {"NVIDIA_TF32_OVERRIDE": "0"}
