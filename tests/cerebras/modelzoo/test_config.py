"""Our configurations against ModelZoo's own schema."""

import copy
import json
from functools import cache

import pytest
import yaml

import sparse_ft.cerebras.modelzoo.cszoo  # noqa: F401  makes SparseMask known, and stands in for bigcode_eval
from sparse_ft.cerebras.checkpoint import LoraPlan
from sparse_ft.cerebras.config import Cluster, TrainerPlan, check_config, create_sparse_config
from sparse_ft.errors import UserError
from sparse_ft.masks.files import save_masks
from sparse_ft.models.checkpoint import Checkpoint

MODES = ("dense", "sparse_to_dense", "sparse_to_sparse", "full")


@pytest.fixture
def configuration(models, data, tmp_path, zoo):
    def make(kind="llama", mode="sparse_to_sparse", **settings):
        source = Checkpoint(models(kind))
        masks = zoo.random_masks(source)
        save_masks(masks, tmp_path / "masks.npz")
        lora = LoraPlan.of(source.config, 8, 16, settings.pop("target_modules", None))
        return create_sparse_config(
            source.config,
            data,
            None if mode == "dense" else tmp_path / "masks.npz",
            mode,
            hf_config=source.folder / "config.json",
            start=tmp_path / "start.mdl",
            model_dir=tmp_path / "run",
            plan=TrainerPlan(lora=lora, **settings),
        )

    return make


@cache
def schema(kind):
    """What ModelZoo's `validate_trainer_params` validates by; it takes seconds to make."""
    from cerebras.modelzoo.trainer.validate import construct_multi_phase_trainer_config

    return construct_multi_phase_trainer_config((kind,))


def validated(config):
    """ModelZoo's typed form of a configuration, as its command line makes it."""
    kind = config["trainer"]["init"]["model"]["name"]
    context = {"metadata_params": copy.deepcopy(config)}
    (typed,) = schema(kind).validate_python(copy.deepcopy(config), context=context)
    return typed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_modelzoos_schema_takes_every_mode(kind, mode, configuration):
    cluster = Cluster(mount_dirs=("/data",), job_labels=("study=x",), job_time_sec=600, micro_batch_size=2)
    config = configuration(kind, mode, eval_steps=2, cluster=cluster)
    typed = validated(yaml.safe_load(yaml.safe_dump(config)))
    callbacks = {type(callback).__orig_class__.__name__: callback for callback in typed.init.callbacks}
    assert ("Lora" in callbacks) == (mode != "full")
    assert ("SparseMask" in callbacks) == (mode in ("sparse_to_dense", "sparse_to_sparse"))
    assert (typed.init.sparsity is not None) == (mode == "full")
    if "SparseMask" in callbacks:
        assert callbacks["SparseMask"].mode == mode


def test_the_backend_takes_our_cluster_section(configuration):
    import cerebras.pytorch as cstorch

    section = Cluster(num_csx=2, mount_dirs=("/",), job_labels=("mlflow_run=abc",), job_time_sec=60).section()
    cluster = cstorch.distributed.ClusterConfig(**section)
    assert (cluster.num_csx, cluster.job_time_sec, cluster.job_labels) == (2, 60, ["mlflow_run=abc"])


def test_the_precursors_failure_is_modelzoos_answer_to_a_callback_it_does_not_know(configuration):
    config = configuration()
    config["trainer"]["init"]["callbacks"][-1] = {"SparseMasks": {}}
    with pytest.raises(Exception, match="does not match any of the expected tags"):
        validated(config)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda init: init.update(sparsity=[{"sparsity": 0.5, "init_metod": "topk"}]), "init_metod"),
        (lambda init: init.update(sparsity=[{"sparsity": 0.5, "init_method": "zeros"}]), "'zeros' is none of"),
        (lambda init: init.update(sparsity=1), r"in \[0, 1\)"),
        (lambda init: init.update(sparsity=0.5), "crashes beside its Lora"),
        (lambda init: init["callbacks"][0]["Lora"]["lora_params"].update(rank=3), "rank"),
        (lambda init: init["callbacks"][0]["Lora"]["lora_params"].update(merge_weights=True), "not masked"),
        (lambda init: init["callbacks"][0]["Lora"]["lora_params"].update(dropout=0.1), "dropout must be 0"),
        (lambda init: init["callbacks"][0]["Lora"]["lora_params"].update(target_modules=["Linear"]), "embeddings"),
        (lambda init: init["callbacks"][1]["SparseMask"].update(mask="x"), "takes masks"),
    ],
)
def test_what_modelzoo_does_not_check_is_checked(change, words, configuration):
    config = configuration()
    change(config["trainer"]["init"])
    with pytest.raises(UserError, match=words):
        check_config(config)


def test_wrong_combinations(configuration, models, data, tmp_path):
    config = Checkpoint(models("llama")).config
    rest = {"hf_config": "c", "start": "s", "model_dir": "m"}
    with pytest.raises(UserError, match="needs masks"):
        create_sparse_config(config, data, None, "sparse_to_sparse", **rest)
    with pytest.raises(UserError, match="takes no masks"):
        create_sparse_config(config, data, tmp_path / "m.npz", "dense", **rest)
    with pytest.raises(UserError, match="mode is 'sparse'"):
        create_sparse_config(config, data, None, "sparse", **rest)
    with pytest.raises(UserError, match="q_proj, v_proj without k_proj, o_proj"):
        LoraPlan.of(config, 8, 16, ("q_proj", "v_proj"))
    with pytest.raises(UserError, match="not on the experts"):
        LoraPlan.of(Checkpoint(models("mixtral")).config, 8, 16, ("w1",))


@pytest.mark.parametrize(
    "target", [None, ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")]
)
def test_the_lora_of_the_configuration_adapts_what_the_start_checkpoint_has(target, configuration, models):
    from cerebras.modelzoo.common.utils.model.lora import make_model_lora
    from cerebras.modelzoo.registry import registry

    config = configuration(mode="dense", target_modules=target)
    init = config["trainer"]["init"]
    model = registry.get_model_class("llama")(dict(init["model"]))
    adapted = make_model_lora(model, init["callbacks"][0]["Lora"]["lora_params"])
    ours = LoraPlan.of(Checkpoint(models("llama")).config, 8, 16, target)
    from sparse_ft.models.cerebras.names import places

    where = places(Checkpoint(models("llama")).config)
    expected = {f"model.{where[n].name.removesuffix('.weight')}.lora_A" for n in ours.adapted(config)}
    assert {name for name in adapted.state_dict() if name.endswith("lora_A")} == expected


def test_the_first_line_of_the_file_is_the_command(configuration, tmp_path):
    from sparse_ft.cerebras.config import write_config

    path = write_config(tmp_path / "fit.yaml", configuration())
    first = path.read_text().splitlines()[0]
    assert first == f"# python -m sparse_ft.cerebras.modelzoo.cszoo fit {path} --target_device CSX"
    assert yaml.safe_load(path.read_text()) == json.loads(json.dumps(configuration()))
