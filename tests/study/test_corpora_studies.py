"""Studies of ``configs/`` that need corpora, at a tiny size: the papers' protocol beside their numbers; recovery."""

import json
import shutil

import pytest
import yaml
from documents import ROOT
from transformers import AutoTokenizer

from sparse_ft.analysis.baselines import compare_baseline, load_baseline
from sparse_ft.analysis.performance import performance_table
from sparse_ft.analysis.sentences import answers
from sparse_ft.analysis.table import cell_table, grouped_table
from sparse_ft.cell.rebuild import rebuild
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.models.checkpoint import Checkpoint
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.runs import Tracker

SMALL = {"dtype": "float32", "eval_limit": 4, "calibration_samples": 4, "calibration_seq_len": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions, and corpora beside them: what calibration reads, and what perplexity reads."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("boolq", "gsm8k", "hellaswag"):
        (folder / task).symlink_to(made_data_dir() / task)
    (folder / "corpora").mkdir()
    lines = (made_data_dir() / "boolq" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["passage"] for line in lines]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[:50])
    (folder / "corpora" / "c4.jsonl").write_text(rows, encoding="utf-8")
    (folder / "corpora" / "fineweb_edu.jsonl").write_text(rows, encoding="utf-8")
    (folder / "corpora" / "wikitext2.test.txt").write_text(" \n".join(texts[50:200]), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_published_study_at_a_tiny_size(tmp_path, tiny_model, data, capsys):
    model = shutil.copytree(tiny_model("tiny-llama"), tmp_path / "Llama-2-7b-hf")
    study = yaml.safe_load((ROOT / "configs/published.yaml").read_text(encoding="utf-8"))
    study["grid"] |= {"model": [str(model)], "sparsity": [0.6, 0.7]}
    study["cell"] |= SMALL | {"data_dir": str(data)}
    study["figures"] = "none"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert sweep(SweepConfig(config=str(tmp_path / "study.yaml"), output_dir=str(tmp_path / "out"))) == 0

    tracker = Tracker()
    runs = [run for run in tracker.search() if run.tags.get("kind") == "cell"]
    assert {run.params["cfg/mode"] for run in runs} == {"pruned"} and len(runs) == 1 + 3 * 2
    assert {run.metrics["sparsity/violations"] for run in runs} == {0}
    assert {run.params["protocol/perplexity_corpus"] for run in runs} == {"wikitext-2-raw/test"}
    assert not any(name.startswith("train/") for run in runs for name in run.metrics)
    shown = capsys.readouterr().out
    assert "pruned, not tuned" in shown and "tuned  " not in shown.replace("untuned", "").replace("not tuned", "")

    cells = cell_table(runs)
    table = performance_table(cells, grouped_table(cells))
    assert table["recovery"].notna().all() and table["recovery_reason"].eq("").all()
    (answer,) = answers(cells, table)
    assert "fine-tuned" not in answer.text.replace("not fine-tuned", "") and "perplexity" in answer.text
    sides = compare_baseline(load_baseline("builtin"), cells, grouped_table(cells))
    ours = sides["not_comparable"].query("source.str.contains('ALPS') and sparsity in (0.6, 0.7)")
    assert (
        len(ours) == 4
        and ours["reason"].str.fullmatch(r"protocol differs: .*perplexity_windows is 166, here \d+").all()
    )

    alps = next(run for run in runs if run.params["cfg/importance"] == "alps" and run.params["cfg/sparsity"] == "0.7")
    again = rebuild(tracker, alps.run_id, tmp_path / "again", Workbench())
    assert Checkpoint(again).fingerprint == alps.tags["merged_fingerprint"]


@pytest.mark.slow
def test_the_recovery_study_at_a_tiny_size(tmp_path, data):
    study = yaml.safe_load((ROOT / "configs/recovery.yaml").read_text(encoding="utf-8"))
    study["grid"] |= {"model": ["tiny-llama"], "sparsity": [0.7], "recover_steps": [0, 2]}
    small = {"max_steps": 2, "batch_size": 2, "max_seq_len": 64, "recover_seq_len": 32, "recover_batch_size": 2}
    study["cell"] |= SMALL | small | {"data_dir": str(data), "perplexity_seq_len": 64, "perplexity_tokens": 256}
    study["figures"] = "none"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert sweep(SweepConfig(config=str(tmp_path / "study.yaml"), output_dir=str(tmp_path / "out"))) == 0
    runs = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    recovered = [run for run in runs if "eval/perplexity_recovered" in run.metrics]
    assert len(runs) == 1 + 4 and len(recovered) == 2
    assert len({run.tags["recovered_fingerprint"] for run in recovered}) == 2  # with a teacher, and without
    assert {run.metrics["sparsity/violations"] for run in runs} == {0}


@pytest.mark.slow
def test_the_study_of_a_small_gpu_at_a_tiny_size(tmp_path, data):
    study = yaml.safe_load((ROOT / "configs/small_gpu.yaml").read_text(encoding="utf-8"))
    for table in study["grid"]:
        table["sparsity"] = [0.5]
        table |= {"recover_steps": [2]} if "recover_steps" in table else {}
    runs = _run_small(study, tmp_path, {"model": "tiny-qwen3", "score": ["hellaswag"], "data_dir": str(data)})
    assert len(runs) == 2 + 2 * 2 + 1 and {run.metrics["sparsity/violations"] for run in runs} == {0}
    assert sum("eval/perplexity_recovered" in run.metrics for run in runs) == 1
    kept = [run.params.get("protocol/train_effective_weights") for run in runs if run.params["cfg/mode"] != "pruned"]
    assert sorted(kept, key=str) == [None] + 3 * ["kept"]  # the dense one makes none; tiny ones leave the room


@pytest.mark.slow
def test_the_study_of_modern_models_at_a_tiny_size(tmp_path, data):
    study = yaml.safe_load((ROOT / "configs/modern.yaml").read_text(encoding="utf-8"))
    study["grid"] |= {"model": ["tiny-llama", "tiny-qwen3"], "task": ["boolq"], "sparsity": [0.6]}
    runs = _run_small(study, tmp_path, {"score": ["hellaswag"], "data_dir": str(data)})
    assert len(runs) == 2 * (1 + 3) and {run.metrics["sparsity/violations"] for run in runs} == {0}
    assert all("eval/hellaswag/accuracy" in run.metrics for run in runs)


def _run_small(study, folder, cell):
    """Runs a study of ``configs/`` with everything that takes long made small; returns its cells."""
    small = {"max_steps": 2, "batch_size": 2, "max_seq_len": 64, "recover_seq_len": 32, "recover_batch_size": 2}
    small = {name: value for name, value in small.items() if name in study["cell"]}
    study["cell"] |= SMALL | small | cell | {"perplexity_seq_len": 64, "perplexity_tokens": 256, "eval_batch_size": 4}
    study["figures"] = "none"
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert sweep(SweepConfig(config=str(folder / "study.yaml"), output_dir=str(folder / "out"))) == 0
    return [run for run in Tracker().search() if run.tags.get("kind") == "cell"]


@pytest.mark.slow
def test_the_study_on_rows_of_ones_own_at_a_tiny_size(tmp_path, data, tiny_model):
    model = shutil.copytree(tiny_model("tiny-llama"), tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(model)
    talk = [{"role": "user", "content": "Is it true?"}, {"role": "assistant", "content": "yes, it is"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(6)))
    study = yaml.safe_load((ROOT / "configs/own_data.yaml").read_text(encoding="utf-8"))
    study["grid"] |= {"model": [str(model)], "task": ["boolq"], "sparsity": [0.5]}
    small = {"num_epochs": 1, "max_seq_len": 64, "batch_size": 2, "perplexity_seq_len": 64, "perplexity_tokens": 256}
    study["cell"] |= SMALL | small | {"data_dir": str(data), "train_data": str(rows)}
    study["figures"] = "none"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert sweep(SweepConfig(config=str(tmp_path / "study.yaml"), output_dir=str(tmp_path / "out"))) == 0
    runs = [run for run in Tracker().search() if run.tags.get("kind") == "cell"]
    assert len(runs) == 2 and {run.params["protocol/train_data_shape"] for run in runs} == {"messages"}
    assert {run.params["protocol/train_mix"] for run in runs} == {"fineweb_edu"}
    assert all(int(run.params["protocol/train_packing_documents"]) > 6 for run in runs)
    assert {run.metrics["sparsity/violations"] for run in runs} == {0}


def test_a_corpus_that_is_not_there_is_said_before_anything_is_made(tmp_path, study_file, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    grid = {"model": ["tiny-llama"], "importance": ["wanda"], "scope": ["row"], "sparsity": [0.5], "mode": ["pruned"]}
    for corpus, said in (("c4", r"put it into data_dir/corpora/c4\.jsonl"), ("nowhere.txt", "there is no such file")):
        path = study_file(grid, cell={"calibration_corpus": corpus})
        with pytest.raises(UserError, match=said):
            sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()
