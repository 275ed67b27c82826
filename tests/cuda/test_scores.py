"""Scores on a GPU: those of lm-eval there, twice the same, and with less memory than the batch wants."""

from dataclasses import replace

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from sparse_ft.evaluation import ScoringSettings, evaluate
from sparse_ft.models.loading import load_model, load_tokenizer
from sparse_ft.tasks.definitions import load_task, write_lm_eval_task
from sparse_ft.tasks.finding import quiet
from sparse_ft.tasks.made import made_data_dir

SMALL = ScoringSettings(eval_limit=12, eval_batch_size=4, perplexity_tokens=0, keep_samples=True)


@pytest.mark.parametrize("name", ["boolq", "hellaswag", "gsm8k"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_to_lm_eval_by_hand_and_twice_the_same(name, dtype, tiny_model, tmp_path):
    folder, shots = tiny_model("tiny-llama"), 1 if name == "gsm8k" else None
    task = load_task(name, made_data_dir(), shots)
    settings = replace(SMALL, eval_limit=2) if name == "gsm8k" else SMALL
    write_lm_eval_task(name, made_data_dir(), tmp_path)
    with quiet():
        theirs = lm_eval.simple_evaluate(
            "hf",
            f"pretrained={folder},dtype={dtype}",
            [name],
            num_fewshot=shots,
            batch_size=4,
            device="cuda",
            limit=settings.eval_limit,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )
    model = load_model(folder, dtype, "cuda")
    ours, again = (evaluate(model, load_tokenizer(folder), task, settings) for _ in range(2))
    assert ours.protocol["device"] == torch.cuda.get_device_name()
    for key, value in theirs["results"][name].items():
        metric, _, filtering = key.partition(",")
        if filtering and not metric.endswith("_stderr"):
            plain = metric + ("" if filtering == "none" else f"_{filtering.replace('-', '_')}")
            assert ours.metrics[plain] == value, key
    for our, their in zip(ours.samples, theirs["samples"][name], strict=True):
        if name == "gsm8k":
            assert our["resps"] == their["resps"]
        else:
            found, wanted = ([response[0] for response in sample["filtered_resps"]] for sample in (our, their))
            assert found == pytest.approx(wanted, rel=1e-5 if dtype == "float32" else 2e-2)
    timing = ("samples_per_second", "tokens_per_second", "seconds")
    same = [{k: v for k, v in e.metrics.items() if not k.endswith(timing)} for e in (ours, again)]
    assert same[0] == same[1]


def test_a_batch_that_does_not_fit_is_halved_until_it_does(tiny_model, memory_limit):
    folder = tiny_model("tiny-llama")
    task, tokenizer = load_task("hellaswag", made_data_dir(), None), load_tokenizer(folder)
    settings = ScoringSettings(eval_limit=40, perplexity_tokens=0)
    model = load_model(folder, "float32", "cuda")
    free = evaluate(model, tokenizer, task, settings)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    evaluate(model, tokenizer, task, settings)
    peak = torch.cuda.max_memory_reserved()
    memory_limit(before + (peak - before) * 6 // 10)
    tight = evaluate(model, tokenizer, task, settings)
    assert tight.protocol["batch_size"] < free.protocol["batch_size"]
    assert tight.metrics["accuracy"] == free.metrics["accuracy"]
