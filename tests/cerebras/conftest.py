"""These tests run in the environment that `make test-cerebras` makes, and most of them in the project's own too."""

import importlib.util

import pytest

collect_ignore = []
if importlib.util.find_spec("cerebras") is None:
    collect_ignore += ["test_model.py", "test_preflight.py"]  # cerebras.pytorch trains, or is to be found
if importlib.util.find_spec("lm_eval") is None:
    collect_ignore += ["test_trainer.py"]  # whole cells are run, from the project's own environment


@pytest.fixture(autouse=True)
def scratch_folder(monkeypatch, tmp_path):
    """cerebras.pytorch writes its artefacts into the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def random_masks():
    """Masks of every prunable tensor of a Hugging Face model, about half of the weights kept, by parameter name."""
    import torch

    from sparse_ft.models.names import prunable_names

    def make(model, sparsity=0.5, seed=3):
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        generator = torch.Generator().manual_seed(seed)
        names = prunable_names(model.config.to_dict(), shapes)
        return {name: torch.rand(shapes[name], generator=generator) >= sparsity for name in names}

    return make
