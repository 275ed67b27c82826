from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_ft.cell.masks import check_mask_set
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig
from sparse_ft.settings.commands import MaskConfig, SweepConfig
from sparse_ft.settings.parser import Parser
from sparse_ft.study.checks.disk import estimate_disk, model_bytes
from sparse_ft.study.checks.preflight import _memory_problem, check_plan, check_resources
from sparse_ft.study.driver import sweep
from sparse_ft.study.executors import executor_problems
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import Study, load_study
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.runs import Tracker


def _plan(small, **rest):
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.6], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    return make_plan(Study("s", grid, {**small, "seed": 0}, **rest))


@pytest.mark.slow
def test_the_estimate_holds_and_is_not_far_off(study_file, small, tmp_path):
    grid = {"model": ["tiny-llama"], "sparsity": [0.3, 0.6], "mode": ["sparse_to_dense", "sparse_to_sparse"]}
    estimate = estimate_disk(_plan(small, keep="all"), Workbench(), 1)
    path = study_file(grid, keep="all")
    assert sweep(SweepConfig(config=str(path), output_dir=str(tmp_path / "out"))) == 0
    weights = sum(path.stat().st_size for path in (tmp_path / "out").rglob("merged*/*.safetensors"))
    weights += sum(path.stat().st_size for path in (tmp_path / "out").glob("*/models/*/*.safetensors"))
    masks = sum(path.stat().st_size for path in (tmp_path / "out").rglob("masks_*.safetensors"))
    adapters = sum(path.stat().st_size for path in (tmp_path / "mlruns").rglob("adapter_model.safetensors"))
    for counted, written in ((estimate.models, weights), (estimate.masks, masks), (estimate.adapters, adapters)):
        assert 0.5 * written <= counted <= 1.2 * written  # of tiny files the headers are a good part
    assert Tracker().search()


def test_each_policy_writes_what_it_says(small):
    sizes = {
        keep: estimate_disk(_plan(small, keep=keep), Workbench(), 1) for keep in ("none", "adapter", "pareto", "all")
    }
    assert sizes["none"].models == sizes["none"].adapters == sizes["adapter"].models == 0
    assert 0 < sizes["adapter"].adapters == sizes["pareto"].adapters == sizes["all"].adapters
    # Five cells; the front holds at most one model for 0 (dense, and merged dense), 30 and 60 %.
    assert sizes["all"].models / 5 == sizes["pareto"].models / 3
    registered = estimate_disk(_plan(small, keep="all", register=True), Workbench(), 1)
    assert (registered.models, registered.registered) == (0, sizes["all"].models)


def test_a_disk_and_a_memory_that_are_too_small_are_both_named(small, tmp_path):
    plan = _plan(small, keep="all")
    bench = Workbench()
    assert check_resources(plan, bench, tmp_path / "not" / "yet", None, 1) == []
    problems = check_resources(plan, bench, tmp_path, None, 10**9)
    assert any("memory" in problem for problem in problems)
    assert any(f"disk of {tmp_path}" in problem and "GB" in problem for problem in problems)


@pytest.mark.parametrize(
    ("how", "more"),
    [
        ({}, False),
        ({"keep_effective": "never"}, False),
        ({"keep_effective": "always"}, True),
        ({"keep_effective": "always", "method": "structured"}, False),
        ({"keep_effective": "always", "mode": ["sparse_to_dense"]}, False),
    ],
)
def test_effective_weights_that_are_kept_whatever_the_room_count_as_memory(small, monkeypatch, how, more):
    grid = {"model": ["tiny-llama"], "sparsity": [0.5], "mode": how.pop("mode", ["sparse_to_sparse"])}
    plan, bench = make_plan(Study("s", grid, {**small, "seed": 0, **how})), Workbench()
    (cell, *_) = plan.configs
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=model_bytes(cell, bench)))
    problem = _memory_problem(plan, bench, 1)
    assert (problem is not None) == more
    assert problem is None or "keep_effective: auto" in problem


def test_a_model_is_shared_out_over_the_gpus_of_a_cell(small, monkeypatch):
    monkeypatch.setattr("sparse_ft.study.checks.preflight.resolve_device", lambda device: torch.device("cuda:0"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    cell = {**small, "seed": 0, "dtype": "float32"}

    def problem(gpus, workers):
        grid = {"model": ["tiny-llama"], "sparsity": [0.5], "mode": ["sparse_to_dense"]}
        plan, bench = make_plan(Study("s", grid, {**cell, "gpus_per_cell": gpus})), Workbench()
        size = model_bytes(plan.configs[0], bench)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, size - 1))
        return _memory_problem(plan, bench, workers)

    assert "more GPUs for a cell (gpus_per_cell)" in problem(1, 4)
    assert problem(2, 2) is None
    assert "2 worker(s)" in problem(2, 4)  # two shares of half a model on each


def test_data_that_nothing_can_be_learned_from_is_named_before_the_first_cell(small, tmp_path):
    for task, split, rows in (
        ("boolq", "validation", 3),  # no training split
        ("hellaswag", "validation", 3),
        ("hellaswag", "train", 3),
    ):
        lines = (made_data_dir() / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (tmp_path / task).mkdir(exist_ok=True)
        (tmp_path / task / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    cell = {**small, "seed": 0, "data_dir": str(tmp_path), "max_seq_len": 2}
    plan = make_plan(Study("s", {"model": ["tiny-llama"], "task": ["boolq", "hellaswag"], "sparsity": [0.5]}, cell))
    split, room = check_plan(plan, Workbench())
    assert "boolq has no training rows" in split
    assert "max_seq_len is 2, but an answer of hellaswag has" in room


@pytest.mark.parametrize("executor", ["process", "ray"])
def test_a_gpu_that_no_worker_would_see_is_named_before_the_first_cell(small, executor):
    cell = {**small, "seed": 0}
    problems = {}
    for device in ("auto", "cuda:0", "cuda:1"):
        plan = make_plan(Study("s", {"model": ["tiny-llama"], "sparsity": [0.5]}, cell | {"device": device}))
        problems[device] = executor_problems(SweepConfig(config="s.yaml", executor=executor), plan)
    assert problems["auto"] == problems["cuda:0"] == []
    (problem,) = problems["cuda:1"]
    assert problem.startswith("device is cuda:1, but a worker")
    assert executor_problems(SweepConfig(config="s.yaml"), plan) == []  # serial sees them all


def test_text_that_does_not_suffice_for_masks_is_named_before_the_first_cell(small):
    masks = {"importance": "wanda", "scope": "row"}
    cell = {**small, **masks, "seed": 0, "calibration_samples": 40, "calibration_seq_len": 64}
    grid = {"model": ["tiny-llama"], "sparsity": [0.5]}
    assert check_plan(make_plan(Study("s", grid, cell)), Workbench()) == []
    (problem,) = check_plan(make_plan(Study("s", grid, cell | {"calibration_samples": 4000})), Workbench())
    assert "calibration asks for 4000 samples of 64 tokens" in problem


@pytest.mark.parametrize(("name", "models"), [("full", 2), ("tiny_full", 2), ("mixtral", 1)])
def test_the_full_studies_are_what_they_say(name, models):
    plan = make_plan(load_study(Path(__file__).resolve().parents[3] / "configs" / f"{name}.yaml"))
    assert len(plan.cells) == models * (180 + 3)
    assert len(plan.cells) - len(plan.computed) == models * 15  # five of six at 0 %, for 3 tasks
    assert len(plan.mask_sets) == models * 3


def test_all_that_is_wrong_with_a_cell_is_said_at_once():
    values = {
        "sparsity": 2, "max_steps": 0, "batch_size": 0, "learning_rate": 0.0, "warmup_fraction": 1.0, "lora_r": 0,
        "seed": -1, "perplexity_seq_len": 1, "perplexity_tokens": -3, "target_modules": "q_proj,,v_proj",
        "register_as": "a/b", "weight_decay": -1.0, "eval_limit": 0, "perplexity_corpus": "/no/such/file",
    }  # fmt: skip
    with pytest.raises(UserError) as raised:
        Parser(CellConfig).values(values, "study x")
    said = str(raised.value)
    for name in (
        "sparsity", "max_steps", "batch_size", "learning_rate", "warmup_fraction", "seed", "target_modules",
        "weight_decay", "eval_limit", "perplexity_corpus", "a/b", "lora_r", "perplexity_seq_len", "perplexity_tokens",
    ):  # fmt: skip
        assert name in said, name
    with pytest.raises(UserError, match=r"max_steps.*batch_size.*warmup_fraction"):
        CellConfig(**values | {"target_modules": None}).check()


def test_all_that_is_wrong_with_masks_is_said_at_once():
    config = MaskConfig(model="no/model", sparsities=(1.5,), seed=-1, device="cuda:99")
    with pytest.raises(UserError, match=r"seed is -1.*1\.5.*cuda:99"):
        check_mask_set(config, Workbench())
