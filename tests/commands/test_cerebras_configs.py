import json
from pathlib import Path

import pytest
import yaml

from sparse_ft.cell.masks import make_masks
from sparse_ft.cell.workbench import Workbench
from sparse_ft.cerebras.config import check_config
from sparse_ft.cerebras.trainer import CerebrasSettings, load_settings
from sparse_ft.commands.cerebras_configs import write_study_configs
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import MaskConfig

SHAPE = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}  # fmt: skip


@pytest.fixture
def study(tmp_path):
    """The grid of configs/full.yaml on two small models of which only the configuration is there."""
    import torch
    from safetensors.torch import save_file

    models = []
    for kind in ("llama", "mistral"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind, **SHAPE}))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
        models.append(str(folder))

    def make(**changes):
        content = yaml.safe_load(Path("configs/full.yaml").read_text(encoding="utf-8"))
        content["grid"]["model"] = models
        content["cell"].update(changes)
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return make


@pytest.mark.slow
def test_all_360_configurations_of_the_full_study(study, tmp_path):
    files = write_study_configs(study(), tmp_path / "out", CerebrasSettings())
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(files) == len(index) == len(set(files))
    trained = [entry for entry in index if entry["masks"]]
    dense = [entry for entry in index if not entry["masks"]]
    assert (len(trained), len(dense)) == (360, 6)
    assert len({entry["masks"] for entry in trained}) == 2 * 3 * 10
    modes = set()
    for entry in index:
        written = yaml.safe_load(Path(entry["config"]).read_text(encoding="utf-8"))
        check_config(written)
        callbacks = {name: value for item in written["trainer"]["init"]["callbacks"] for name, value in item.items()}
        modes.add(callbacks.get("SparseMask", {}).get("mode", "dense"))
        assert written["trainer"]["init"]["loop"]["max_steps"] == 500
        assert written["trainer"]["fit"]["train_dataloader"]["batch_size"] == 16
        assert callbacks["Lora"]["lora_params"]["merge_weights"] is False
    assert modes == {"dense", "sparse_to_dense", "sparse_to_sparse"}


def test_every_mask_set_and_model_has_a_place_of_its_own_and_patterns_are_spelt_as_the_masks_files_are(tmp_path):
    import torch
    from safetensors.torch import save_file

    models = []
    for place, theta in (("a", 1e4), ("b", 1e6)):
        folder = tmp_path / place / "merged"
        folder.mkdir(parents=True)
        rope = {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **rope}))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
        models.append(str(folder))
    grid = {"model": models, "method": ["semi_structured"], "pattern": ["2:4", "1:2"], "sparsity": [0.5]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "grid": grid, "dense_baseline": False}))
    files = write_study_configs(path, tmp_path / "out", CerebrasSettings())
    masks = [Path(entry["masks"]) for entry in json.loads((tmp_path / "out" / "index.json").read_text())]
    assert len(files) == len(set(masks)) == len({file.parent for file in masks}) == 4
    assert {file.name for file in masks} == {
        "masks_sparsity50_semi_structured_2of4.safetensors",
        "masks_sparsity50_semi_structured_1of2.safetensors",
    }
    seeds = {"name": "t", "grid": {"model": models[:1], "seed": [0, 1], "data_dir": ["here", "there"]}}
    path.write_text(yaml.safe_dump(seeds | {"dense_baseline": False}))
    rows = {str(yaml.safe_load(file.read_text())).split("/data/")[1].split("'")[0]
            for file in write_study_configs(path, tmp_path / "rows", CerebrasSettings())}  # fmt: skip
    assert len(rows) == 4
    written = [json.loads(file.read_text()) for file in (tmp_path / "out" / "models").glob("*/config.json")]
    assert sorted(config["rope_parameters"]["rope_theta"] for config in written) == [1e4, 1e6]


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ({"method": "semi_structured", "pattern": "2:4"}, "masks_sparsity50_semi_structured_2of4.safetensors"),
        ({"method": "semi_structured", "pattern": "1:2"}, "masks_sparsity50_semi_structured_1of2.safetensors"),
        ({"sparsity": 0.125}, "masks_sparsity12.5_unstructured.safetensors"),
        ({"sparsity": 1 / 3}, None),
        ({"method": "structured", "sparsity": 0.3}, "masks_sparsity30_structured.safetensors"),
        ({"method": "random"}, "masks_sparsity50_random.safetensors"),
    ],
)
def test_mask_files_have_the_names_that_the_mask_engine_gives_them(study, tmp_path, cell, name):
    folder = yaml.safe_load(study().read_text())["grid"]["model"][0]
    path = tmp_path / "one.yaml"
    values = {"lora_dropout": 0.0, "data_dir": "made", **cell}
    path.write_text(yaml.safe_dump({"grid": {"model": [folder]}, "cell": values, "dense_baseline": False}))
    write_study_configs(path, tmp_path / "out", CerebrasSettings())
    (entry,) = json.loads((tmp_path / "out" / "index.json").read_text())
    made = MaskConfig(model="tiny-llama", sparsities=(cell.get("sparsity", 0.5),), **without_sparsity(cell))
    (file,) = make_masks(made, Workbench(), tmp_path / "made")
    assert Path(entry["masks"]).name == file.path.name
    assert name in (None, file.path.name)


def without_sparsity(cell):
    return {key: value for key, value in cell.items() if key != "sparsity"}


def test_a_cell_that_modelzoo_cannot_take_is_named(study, tmp_path):
    with pytest.raises(UserError, match=r"dense · boolq · .*llama: target_modules .* cannot adapt q_proj"):
        write_study_configs(study(target_modules="q_proj"), tmp_path / "out", CerebrasSettings())
    with pytest.raises(UserError, match="lora_dropout must be 0"):
        write_study_configs(study(lora_dropout=0.1), tmp_path / "out", CerebrasSettings())
    second = tmp_path / "mistral" / "config.json"
    second.write_text(json.dumps({"model_type": "mistral", **SHAPE, "head_dim": 8}))
    with pytest.raises(UserError, match="dense · boolq · mistral: The model's head_dim 8 times 4"):
        write_study_configs(study(), tmp_path / "out", CerebrasSettings())
    assert not (tmp_path / "out").exists(), "half of it was written"


def test_settings_from_a_file(tmp_path):
    file = tmp_path / "cerebras.yaml"
    file.write_text("python: /env/bin/python\ndevice: CPU\ncluster:\n  mount_dirs: [/data]\n  job_time_sec: 60\n")
    settings = load_settings(file)
    assert (settings.python, settings.device, settings.cluster.mount_dirs) == ("/env/bin/python", "CPU", ("/data",))
    file.write_text("cluster:\n  mounts: [/data]\n")
    with pytest.raises(UserError, match="unknown field 'mounts'"):
        load_settings(file)
