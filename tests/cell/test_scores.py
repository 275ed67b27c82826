"""How a cell's scores are asked for from the command line: what is read, how, and what is kept of it."""

import json
import runpy
import sys

import pytest

from sparse_ft.tracking.runs import Tracker

SMALL = {"model": "tiny-llama", "data_dir": "made", "max_steps": 1, "batch_size": 2, "lora_r": 2, "sparsity": 0.5,
         "perplexity_seq_len": 16, "perplexity_tokens": 64}  # fmt: skip


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Runs the entry point `train`; returns its run."""

    def run(**values):
        argv = [part for key, value in (SMALL | values).items() for part in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["train", *argv, "--output_dir", str(tmp_path / "cell")])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("entrypoints.train", run_name="__main__")
        assert stop.value.code == 0
        return Tracker().search()[-1]

    return run


def test_every_answer_can_be_kept_as_an_artifact(trained, tmp_path):
    run = trained(task="hellaswag", mode="sparse_to_dense", eval_limit=3, keep_samples="true")
    stages = ("score", "score_untuned", "score_re-masked")
    assert {f"samples/{stage}.jsonl" for stage in stages} <= set(Tracker().artifacts(run.run_id))
    for stage, suffix in zip(stages, ("", "_untuned", "_remasked"), strict=True):
        lines = (tmp_path / "cell" / "samples" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == 3
        mean = sum(sample["acc_norm"] for sample in samples) / 3
        assert run.metrics[f"eval/acc_norm{suffix}"] == pytest.approx(mean)
        assert all(len(sample["filtered_resps"]) == 4 for sample in samples)  # the four endings


def test_by_default_no_answers_are_kept(trained):
    assert not [path for path in Tracker().artifacts(trained(eval_limit=2).run_id) if "samples" in path]


def test_hellaswag_at_ten_shots(trained, tmp_path):
    run = trained(task="hellaswag", eval_limit=2, num_fewshot=10, keep_samples="true", score_untuned="false")
    assert run.params["protocol/num_fewshot"] == "10"
    first = json.loads((tmp_path / "cell/samples/score.jsonl").read_text(encoding="utf-8").splitlines()[0])
    context = first["arguments"][0][0]
    assert context.count("\n\n") == 10  # what lm-eval puts between examples


def test_shared_contexts_and_the_batch_size_found_are_in_the_protocol(trained):
    plain = trained(task="hellaswag", eval_limit=4, score_untuned="false")
    shared = trained(task="hellaswag", eval_limit=4, score_untuned="false", share_contexts="true")
    assert [run.params["protocol/shared_contexts"] for run in (plain, shared)] == ["false", "true"]
    assert int(plain.params["protocol/batch_size"]) >= 1 and plain.params["cfg/eval_batch_size"] == "auto"
    assert shared.metrics["eval/loss"] == pytest.approx(plain.metrics["eval/loss"], rel=1e-4)


def test_perplexity_of_a_text_of_ones_own(trained, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("The water of the river and the water of the sea. " * 20, encoding="utf-8")
    run = trained(eval_limit=2, score_untuned="false", perplexity_corpus=text)
    assert (run.params["protocol/perplexity_corpus"], run.params["protocol/perplexity_seq_len"]) == (
        "book.txt",
        "16",
    )
    assert int(run.params["protocol/perplexity_tokens"]) == 4 * 15
    assert run.metrics["eval/perplexity"] > 1


@pytest.mark.slow
def test_a_run_logs_what_it_wrote_and_deletes_nothing(trained, tmp_path):
    """Twice into one folder, the second time with other masks and fewer scores."""
    first = trained(task="hellaswag", mode="sparse_to_dense", eval_limit=2, keep_samples="true", keep="none")
    mine = tmp_path / "cell" / "samples" / "mine.jsonl"
    mine.write_text("mine")
    before = {path for path in (tmp_path / "cell").rglob("*") if path.is_file()}
    values = {"sparsity": 0.7, "score_untuned": "false", "eval_limit": 2, "keep_samples": "true"}
    second = trained(task="hellaswag", **values)
    assert second.run_id != first.run_id
    files = Tracker().artifacts(second.run_id)
    assert [name for name in files if name.startswith("samples/")] == ["samples/score.json", "samples/score.jsonl"]
    assert {name for name in files if name.startswith("masks/masks")} == {
        "masks/masks_sparsity70_unstructured.safetensors"
    }
    assert not [name for name in files if "sparsity50" in name]
    assert "samples/score_untuned.jsonl" in Tracker().artifacts(first.run_id)
    assert all(path.is_file() for path in before)
    assert mine.read_text() == "mine"
