"""Studies that score tasks beside the trained one, and such as leave open what perplexity is measured on."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from documents import ROOT
from suite import write_group, write_suite

from sparse_ft.cli import run as command
from sparse_ft.errors import UserError
from sparse_ft.settings.commands import SweepConfig
from sparse_ft.study.driver import sweep
from sparse_ft.study.perplexity import with_perplexity
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import load_study
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.runs import Tracker

TEXTS = [json.loads(line)["passage"] for line in (made_data_dir() / "boolq" / "train.jsonl").read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    """Rows of all tasks, and the corpora; without a hub."""
    folder = write_suite(tmp_path / "data", rows=3)
    for name in ("boolq", "hellaswag"):
        shutil.copytree(made_data_dir() / name, folder / name)
    (folder / "corpora").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50])
    (folder / "corpora" / "c4.jsonl").write_text(rows, encoding="utf-8")
    (folder / "corpora" / "wikitext2.test.txt").write_text(" \n".join(TEXTS[:300]), encoding="utf-8")
    return folder


def cells():
    return [run for run in Tracker().search() if run.tags.get("kind") == "cell"]


@pytest.mark.slow
def test_the_zero_shot_study_at_a_tiny_size(tmp_path, data, capsys):
    """With a group of one's own in the place of mmlu, and a trained cell beside the pruned one."""
    study = yaml.safe_load((ROOT / "configs/zero_shot.yaml").read_text(encoding="utf-8"))
    assert study["cell"]["score"].pop() == "mmlu:5"
    study["grid"] |= {"model": ["tiny-llama"], "importance": ["wanda"], "sparsity": [0.5]}
    study["grid"]["mode"] = ["pruned", "sparse_to_dense"]
    small = {"dtype": "float32", "eval_limit": 3, "calibration_samples": 4, "calibration_seq_len": 32, "max_steps": 1}
    small |= {"batch_size": 2, "lora_r": 2, "perplexity_tokens": 64, "recover_steps": 1, "recover_batch_size": 1}
    small |= {"data_dir": str(data), "include_path": str(write_group(tmp_path / "groups")), "recover_seq_len": 16}
    names = [*study["cell"]["score"], "tiny_all"]
    study["cell"] |= small | {"score": [*study["cell"]["score"], "tiny_all:5"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"figures": "none"}), encoding="utf-8")
    assert sweep(SweepConfig(config=str(tmp_path / "study.yaml"), output_dir=str(tmp_path / "out"))) == 0

    sparse = [run for run in cells() if float(run.params["cfg/sparsity"])]
    pruned, trained = sorted(sparse, key=lambda run: run.params["cfg/mode"])
    for name in names:
        for after in ("", "_untuned", "_recovered", "_remasked"):
            assert f"eval/{name}/accuracy{after}" in trained.metrics
        # Before training it is the pruned model.
        assert trained.metrics[f"eval/{name}/accuracy_untuned"] == pruned.metrics[f"eval/{name}/accuracy"]
        assert "accuracy_metric=acc; " in pruned.params[f"protocol/score/{name}"]
    mean = sum(pruned.metrics[f"eval/{name}/accuracy"] for name in names) / len(names)
    assert pruned.metrics["eval/mean_accuracy"] == pytest.approx(mean)
    assert (
        trained.params["cfg/score"].endswith("tiny_all:5,winogrande")
        and len(trained.params["identity/score_data"]) == 16
    )
    files = Tracker().artifacts(trained.run_id)
    members = json.loads(Tracker().fetch_text(trained.run_id, "scores/score.json"))
    assert "scores/score_re-masked.json" in files and {"piqa", "tiny_rivers"} <= set(members)
    parent = Tracker().run(trained.parent_run_id)
    shown = capsys.readouterr().out
    assert "accuracy on the tasks scored beside" in shown and "winogrande" in shown
    report = set(Tracker().artifacts(parent.run_id))
    assert {"report/scores.csv", "report/report.html"} <= report
    assert "tiny_all" in Tracker().fetch_text(parent.run_id, "report/table.txt")


def test_a_task_that_cannot_be_had_is_said_before_a_model_is_loaded(study_file, tmp_path, data, capsys):
    study = study_file({"model": ["tiny-llama"]}, cell={"score": ["piqa", "social_iqa", "copa"], "data_dir": str(data)})
    with pytest.raises(
        UserError, match=r"cannot load the data of copa from the hub .*\| cannot load the data of social"
    ):
        sweep(SweepConfig(config=str(study), output_dir=str(tmp_path / "out")))
    words = [
        "--model",
        "tiny-llama",
        "--data_dir",
        str(data),
        "--score",
        "copa",
        "--output_dir",
        str(tmp_path / "cell"),
    ]
    assert command("train", words, "train") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "give data_dir: a folder with copa/" in said
    assert command("train", [*words, "--score", "piqa", "--chat_template", "true"], "train") == 2
    assert "chat_template: the tokenizer of tiny-llama has no chat template" in capsys.readouterr().err
    assert not cells() and not (tmp_path / "out").exists() and not (tmp_path / "cell").exists()


def open_study(tmp_path, data, **cell):
    """A study whose file says nothing of perplexity."""
    values = {"data_dir": str(data), "eval_limit": 2, "max_steps": 1, "batch_size": 2, "lora_r": 2, **cell}
    study = {"name": "open", "grid": {"model": ["tiny-llama"], "sparsity": [0.5, 0.6]}, "cell": values}
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(study | {"dense_baseline": False, "keep": "none", "figures": "none"}))
    return path


def test_perplexity_is_the_papers_where_their_text_is_there(tmp_path, data):
    study = load_study(open_study(tmp_path, data))
    found = with_perplexity(study, SweepConfig(config=""), make_plan)
    asked = {name: found.cell[f"perplexity_{name}"] for name in ("corpus", "seq_len", "tokens")}
    assert asked == {"corpus": "wikitext2", "seq_len": 2048, "tokens": 16384}  # on a CPU
    configs = make_plan(found).configs
    assert {(c.perplexity_corpus, c.perplexity_seq_len, c.perplexity_tokens) for c in configs} == {
        ("wikitext2", 2048, 16384)
    }
    # It is the same study wherever it is run.
    (data / "corpora" / "wikitext2.test.txt").unlink()
    without = with_perplexity(study, SweepConfig(config=""), make_plan)
    assert {c.perplexity_corpus for c in make_plan(without).configs} == {"task"}
    assert make_plan(without).key == make_plan(found).key == make_plan(study).key
    # Whoever says anything of it has said it all.
    for said in ({"perplexity_tokens": 64}, {"perplexity_seq_len": 64}, {"perplexity_corpus": "task"}):
        given = replace(study, cell={**study.cell, **said})
        assert with_perplexity(given, SweepConfig(config=""), make_plan) is given
        assert {c.perplexity_corpus for c in make_plan(given).configs} == {"task"}


@pytest.mark.slow
def test_a_study_that_is_resumed_keeps_its_perplexity(tmp_path, data, monkeypatch):
    """Though the text, or the hub, has come or gone since: no two cells of a study differ in it."""
    config = SweepConfig(config=str(open_study(tmp_path, data)), output_dir=str(tmp_path / "out"))
    text = data / "corpora" / "wikitext2.test.txt"
    text.rename(tmp_path / "away.txt")
    from sparse_ft.study.worker import Worker

    whole = Worker._cell
    done = []

    def stop(self, job, run_id, began):
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return whole(self, job, run_id, began)

    monkeypatch.setattr(Worker, "_cell", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(config)
    monkeypatch.setattr(Worker, "_cell", whole)
    (tmp_path / "away.txt").rename(text)
    assert sweep(config) == 0
    finished = [run for run in cells() if run.status == "FINISHED"]
    assert len(finished) == 2 and len({run.parent_run_id for run in finished}) == 1
    assert {run.params["protocol/perplexity_corpus"] for run in finished} == {"boolq/validation"}
    assert {run.params["cfg/perplexity_seq_len"] for run in finished} == {"256"}


def test_a_single_cell_has_it_too_and_says_so(tmp_path, data):
    words = {"model": "tiny-llama", "data_dir": data, "max_steps": 1, "batch_size": 2, "lora_r": 2, "eval_limit": 2,
             "score_untuned": "false", "output_dir": tmp_path / "cell"}  # fmt: skip
    flags = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    assert command("train", flags, "train") == 0
    (run,) = cells()
    assert run.params["protocol/perplexity_corpus"] == "wikitext-2-raw/test"
    assert run.params["protocol/perplexity_seq_len"] == "2048" and run.params["cfg/perplexity_tokens"] == "16384"
    assert len(run.params["identity/perplexity_text"]) == 16
