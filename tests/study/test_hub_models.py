"""The full study's own file, its models and its data from a hub: gated, in shards, among files that nobody wants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from documents import ROOT
from hub import COMMIT, hub_server
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.models.catalog import locate
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.definitions import load_task
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tasks.sources import split_context
from sparse_ft.tracking.runs import Tracker

pytestmark = pytest.mark.slow

MODELS = {"meta-llama/Llama-2-7b-hf": "tiny-llama", "mistralai/Mistral-7B-v0.1": "tiny-mistral"}
DATA = {  # repository -> task, configuration, folder, split that is scored; as the hub has them
    "aps/super_glue": ("boolq", "boolq", "boolq", "validation"),
    "Rowan/hellaswag": ("hellaswag", "default", "data", "validation"),
    "openai/gsm8k": ("gsm8k", "main", "main", "test"),
}
# What makes the study take a day, made small; everything else is the file's.
SMALL = {"max_steps": 2, "batch_size": 2, "eval_limit": 4, "perplexity_tokens": 128, "perplexity_seq_len": 64}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a hub with tiny models in the places of the large ones, and small made-up data."""
    root = tmp_path_factory.mktemp("hub")
    for name, kind in MODELS.items():
        folder = root / "models" / name
        config = AutoConfig.from_pretrained(locate(kind))
        config.hidden_size = config.head_dim * config.num_attention_heads  # as of the models that are meant
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200KB")
        load_tokenizer(locate(kind)).save_pretrained(folder)
        assert (folder / "model.safetensors.index.json").is_file()
        for unwanted in ("pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "original/weights.pth"):
            (folder / unwanted).parent.mkdir(exist_ok=True)
            (folder / unwanted).write_bytes(bytes(64))
    for name, (task, configuration, place, held_out) in DATA.items():
        folder, files = root / "datasets" / name, []
        (folder / place).mkdir(parents=True)
        for split in ("train", held_out):
            lines = (made_data_dir() / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            if task == "boolq":  # SuperGLUE's column
                rows = [{"label": int(row.pop("answer")), **row} for row in rows]
            if task == "hellaswag":
                rows = [row | dict(zip(("ctx_a", "ctx_b"), split_context(row["ctx"]), strict=True)) for row in rows]
            table = datasets.Dataset.from_list(rows)
            table.to_parquet(folder / place / f"{split}-00000-of-00001.parquet")
            files.append({"split": split, "path": f"{place}/{split}-*"})
        card = yaml.safe_dump({"configs": [{"config_name": configuration, "data_files": files}]}, sort_keys=False)
        (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return root


def start(step, *arguments, address, token=None, folder):
    """A step as a user starts it, with a home of its own for what comes from the hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [Path(sys.executable).with_name("sparse-ft"), step, *arguments]  # from a folder that is not the project's
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_full_studys_configurations_for_a_cerebras(published, tmp_path):
    """For them a model's ``config.json`` is all that is fetched."""
    full = ["--config", str(ROOT / "configs/full.yaml"), "--output_dir", "configurations"]
    with hub_server(published, token="secret") as (address, served):
        refused = start("cerebras_configs", *full, address=address, folder=tmp_path)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "model meta-llama/Llama-2-7b-hf is gated: accept its licence at https://" in refused.stderr
        assert not (tmp_path / "configurations").exists()
        written = start("cerebras_configs", *full, address=address, token="secret", folder=tmp_path)
        assert written.returncode == 0 and "366 configurations" in written.stdout, written.stderr
        assert sorted(served) == sorted(f"{name}/config.json" for name in MODELS)
        nowhere = ["--model", f"mistralai/Mistral-7B-v0.1@{'f' * 40}", "--sparsities", "0.5"]
        missing = start("compute_masks", *nowhere, address=address, token="secret", folder=tmp_path)
        assert missing.returncode == 2 and missing.stderr.count("\n") == 1
        assert f"model mistralai/Mistral-7B-v0.1 has no revision {'f' * 40}" in missing.stderr


def test_the_full_study_with_its_models_and_data_from_a_hub(published, tmp_path):
    study = yaml.safe_load((ROOT / "configs/full.yaml").read_text(encoding="utf-8"))
    full = ["--config", str(ROOT / "configs/full.yaml"), "--dry-run"]
    study["grid"]["sparsity"], study["grid"]["method"] = [0, 0.5], ["unstructured"]
    study["cell"] |= SMALL
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    small = ["--config", "small.yaml", "--executor", "process", "--max_workers", "2"]

    with hub_server(published, token="secret") as (address, served):
        refused = start("sweep", *small, address=address, folder=tmp_path)
        assert refused.returncode == 2, refused.stderr
        for name in MODELS:
            assert f"model {name} is gated: accept its licence at https://huggingface.co/{name}" in refused.stderr
        assert not any(file.startswith("meta-llama") for file in served)

        planned = start("sweep", *full, address=address, token="secret", folder=tmp_path)
        assert planned.returncode == 0 and "study full: 366 cells, 6 mask sets" in planned.stdout, planned.stderr
        assert "problem:" not in planned.stdout

        done = start("sweep", *small, address=address, token="secret", folder=tmp_path)
        failed = [run.tags for run in Tracker().search() if run.status == "FAILED"]
        why = [f"{tags.get('failure_class')}: {tags.get('failure_message')}" for tags in failed]
        assert done.returncode == 0, "\n".join([*why, done.stdout, done.stderr])
        weights = [file for file in served if file.endswith((".bin", ".safetensors", ".pth", ".parquet"))]
        assert len(weights) == len(set(weights)) > 6, "two workers fetched the same file"
        assert all("/model-0000" in file or file.endswith(".parquet") for file in weights)

    cells = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    assert len(cells) == 6 + 2 * 3 * (2 + 2) and {run.status for run in cells} == {"FINISHED"}
    for run in (run for run in cells if "same_as" not in run.tags):
        model = Checkpoint(published / "models" / run.params["cfg/model"])
        assert run.tags["hub_commit"] == COMMIT and run.tags["base_fingerprint"] == model.fingerprint
        assert run.params["protocol/source"].removeprefix("hub:") in DATA

    # The questions are known again, whatever columns they lie in.
    model, tokenizer = load_model(locate("tiny-llama")), load_tokenizer(locate("tiny-llama"))
    four = ScoringSettings(eval_limit=4, perplexity_tokens=0)
    for task, *_ in DATA.values():
        here = evaluate(model, tokenizer, load_task(task, made_data_dir()), four)
        there = {run.params.get("protocol/questions_sha256") for run in cells if run.params["cfg/task"] == task}
        assert there - {None} == {here.protocol["questions_sha256"]}

    # A node of a cluster that does not reach the hub works with what another has fetched.
    # So does who asks for the very commit.
    cell = {"model": f"meta-llama/Llama-2-7b-hf@{COMMIT}", "sparsity": 0.3, "keep": "none", **SMALL}
    options = [part for name, value in cell.items() for part in (f"--{name}", str(value))]
    alone = start("train", *options, address=address, token="secret", folder=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "Fetching" not in done.stderr + alone.stderr, "bars of the hub's client for what takes no time"
    (run,) = [run for run in Tracker().search() if run.params.get("cfg/sparsity") == "0.3"]
    assert run.tags["hub_commit"] == COMMIT
