from dataclasses import replace

import pytest

from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.field import part_of
from sparse_ft.settings.lora import LoraSettings
from sparse_ft.settings.parser import Parser
from sparse_ft.settings.rules import RULES
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.settings.training import TrainingSettings


def test_a_key_ignores_where_results_go_and_nothing_else():
    cell = CellConfig()
    same = [replace(cell, output_dir="elsewhere"), replace(cell, register_as="auto"), replace(cell, keep="all")]
    assert {other.key() for other in same} == {cell.key()}
    changes = [{"seed": 1}, {"sparsity": 0.6}, {"eval_limit": 3}, {"dtype": "float32"}]
    others = [replace(cell, **change) for change in changes]
    assert len({other.key() for other in [cell, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"measure": True}, "measure is for one device"),
        ({"recover_steps": 2}, "recovery trains on one device"),
        ({"teacher": "dense"}, "a teacher needs a cell on one device"),
        ({"device": "cuda:1"}, "leave it at auto"),
    ],
)
def test_what_a_group_of_processes_does_not_do_is_said(values, said):
    (problem,) = CellConfig(gpus_per_cell=2, **values).problems()
    assert problem.startswith("gpus_per_cell is 2, but") and said in problem
    assert not list(CellConfig(**values).problems())


def test_a_group_makes_another_cell_only_where_something_is_trained():
    trained, pruned = CellConfig(), CellConfig(mode="pruned")
    assert replace(trained, gpus_per_cell=2).key() != trained.key()
    assert replace(pruned, gpus_per_cell=2).key() == pruned.key()


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ({"mode": "dense"}, {"method": "structured", "sparsity": 0.9, "importance": "wanda", "pattern": "1:2"}),
        ({"mode": "dense"}, {"allocation": "owl", "calibration_samples": 8, "force": True}),
        ({"method": "random"}, {"importance": "taylor", "scope": "global", "calibration_seq_len": 32}),
        ({"method": "unstructured"}, {"pattern": "1:2", "calibration_samples": 8}),
        ({"method": "semi_structured"}, {"scope": "row"}),
        ({"method": "experts"}, {"importance": None, "pattern": "1:2"}),
        ({"method": "experts", "importance": "reap"}, {"importance": "magnitude"}),
        ({"mode": "full"}, {"rslora": True}),
        ({"num_epochs": 2.0}, {"max_steps": 7}),
        ({"mode": "pruned"}, {"num_epochs": 2.0, "schedule": "cosine", "train_data": "wikitext2", "loss_on": "all"}),
        ({"mode": "full"}, {"lora_r": 64, "lora_alpha": 1.0, "target_modules": ("q_proj",)}),
    ],
)
def test_fields_that_cannot_matter_make_no_other_cell(values, changes):
    cell = CellConfig(**values)
    for name, value in changes.items():
        assert replace(cell, **{name: value}).key() == cell.key(), name


@pytest.mark.parametrize(
    ("values", "own", "other"),
    [
        ({"importance": "wanda", "scope": "row"}, "none", "sparsegpt"),
        ({"importance": "wanda", "scope": "row"}, "none", "refit"),
        ({"importance": "sparsegpt"}, "sparsegpt", "none"),
        ({"importance": "alps"}, "refit", "sparsegpt"),
        ({"method": "random"}, "none", "sparsegpt"),
    ],
)
def test_an_update_is_spoken_of_where_it_is_not_the_importances_own(values, own, other):
    plain, same, apart = (CellConfig(**values, update=update) for update in ("auto", own, other))
    assert plain.canonical() == same.canonical() and "update" not in plain.canonical()
    assert mask_set_of(plain) == mask_set_of(same) != mask_set_of(apart)
    assert apart.canonical()["update"] == other and apart.key() != plain.key()
    assert Parser(CellConfig).values(apart.canonical(), "its config.yaml").key() == apart.key()
    assert replace(plain, mode="dense").canonical() == replace(apart, mode="dense").canonical()


@pytest.mark.parametrize("how", [{}, {"task": "gsm8k", "seed": 3}])
def test_experts_are_chosen_by_reap_whatever_the_default_of_weights_is(how):
    kinds = {mask_set_of(CellConfig(method="experts", importance=name, **how)) for name in ("magnitude", None, "reap")}
    (kind,) = kinds
    assert (kind.importance, kind.rule, kind.needs_calibration) == ("reap", RULES["reap"], True)
    assert CellConfig(method="experts").canonical()["importance"] == "reap"


@pytest.mark.parametrize("how", [{"update": "sparsegpt"}, {"refine": "swaps"}, {"reconstruct": "block"}])
def test_what_follows_a_mask_reads_text_whatever_the_masks_do(how):
    kind = mask_set_of(CellConfig(calibration_samples=8, seed=3, task="gsm8k", **how))
    assert (kind.task, kind.calibration_samples, kind.seed) == ("gsm8k", 8, 3)


def test_a_refinement_is_spoken_of_where_there_is_one():
    plain, better = CellConfig(importance="wanda"), CellConfig(importance="wanda", refine="swaps")
    assert "refine" not in plain.canonical() and better.canonical()["refine"] == "swaps"
    assert mask_set_of(plain) != mask_set_of(better) and plain.key() != better.key()
    assert Parser(CellConfig).values(better.canonical(), "its config.yaml").key() == better.key()
    assert replace(plain, mode="dense").canonical() == replace(better, mode="dense").canonical()


def test_how_blocks_are_tuned_is_spoken_of_where_they_are():
    plain, tuned = CellConfig(reconstruct_epochs=3), CellConfig(reconstruct="block", reconstruct_epochs=3)
    assert plain.canonical() == CellConfig().canonical() and mask_set_of(plain) == mask_set_of(CellConfig())
    values = tuned.canonical()
    assert (values["reconstruct"], values["reconstruct_epochs"]) == ("block", 3)
    assert "reconstruct_batch" not in values and mask_set_of(tuned).reconstruct_epochs == 3
    assert Parser(CellConfig).values(values, "its config.yaml").key() == tuned.key()
    assert replace(tuned, mode="dense").key() == CellConfig(mode="dense").key()


def test_the_same_fields_tell_cells_apart_where_they_matter():
    for values, changes in [
        ({"importance": "wanda"}, {"calibration_samples": 8, "scope": "row", "allocation": "owl"}),
        ({"method": "semi_structured"}, {"pattern": "1:2"}),
        ({"allocation": "owl"}, {"calibration_seq_len": 8, "allocation": "dlp"}),
    ]:
        cell = CellConfig(**values)
        for name, value in changes.items():
            assert replace(cell, **{name: value}).key() != cell.key(), name


@pytest.mark.parametrize(
    ("cell", "title"),
    [
        (CellConfig(mode="dense"), "dense · boolq · smollm2-135m"),
        (CellConfig(model="a/b-7b", sparsity=0.125), "12.5 % s2s unstructured magnitude · boolq · b-7b"),
        (CellConfig(mode="sparse_to_dense", sparsity=0.7), "70 % s2d unstructured magnitude · boolq · smollm2-135m"),
        (CellConfig(method="random"), "50 % s2s random · boolq · smollm2-135m"),
        (CellConfig(method="experts"), "50 % s2s experts reap · boolq · smollm2-135m"),
        (CellConfig(importance="wanda", update="none"), "50 % s2s unstructured wanda · boolq · smollm2-135m"),
        (
            CellConfig(importance="wanda", update="sparsegpt"),
            "50 % s2s unstructured wanda+sparsegpt · boolq · smollm2-135m",
        ),
        (
            CellConfig(importance="wanda", refine="swaps", update="refit"),
            "50 % s2s unstructured wanda+swaps+refit · boolq · smollm2-135m",
        ),
        (CellConfig(importance="alps", reconstruct="block"), "50 % s2s unstructured alps+block · boolq · smollm2-135m"),
        (CellConfig(method="random", update="sparsegpt"), "50 % s2s random+sparsegpt · boolq · smollm2-135m"),
    ],
)
def test_titles(cell, title):
    assert cell.title == title


def test_the_rounding_is_part_of_a_cell_but_in_float32():
    for dtype, agree in (("float32", True), ("bfloat16", False), ("float16", False)):
        keys = {CellConfig(dtype=dtype, rounding=rounding).key() for rounding in ("dithered", "nearest")}
        assert (len(keys) == 1) == agree, dtype


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "3c88367ef91f4b67"),
        ({"mode": "dense"}, "4bc50b582a6028f0"),
        ({"mode": "dense", "method": "none", "importance": "none", "scope": "none", "sparsity": 0}, "4bc50b582a6028f0"),
        ({"method": "random", "importance": "wanda"}, "fadcd1629a110c4f"),
        ({"method": "random", "importance": "none", "scope": "none"}, "fadcd1629a110c4f"),
        ({"method": "semi_structured", "pattern": "1:4", "sparsity": 0.75, "scope": "row"}, "e0b4e2af5280f912"),
        ({"importance": "wanda", "scope": "global", "force": True}, "58e01851256a59c1"),
        ({"mode": "full", "lora_r": 3, "dtype": "float32"}, "f35456b77a6c0d61"),
        ({"target_modules": "v_proj, q_proj"}, "06eff5717ad8a28b"),
        ({"eval_limit": 40, "num_fewshot": 5, "eval_batch_size": 4}, "d614258f7f7fceef"),
        ({"eval_limit": "none", "perplexity_tokens": "none"}, "1160037aa8916cf4"),
        ({"masks": "m.safetensors"}, "880ef70968915c5b"),
        ({"gradient_checkpointing": "reentrant", "keep": "all", "register_as": "auto"}, "3acbaae1e838e4c9"),
    ],
)
def test_a_key_is_that_of_version_0_1_0(values, key):
    """Runs are found again by it. The literal keys were computed before settings were composed of parts."""
    cell = Parser(CellConfig).values(values, "a run")
    assert cell.key() == key
    assert Parser(CellConfig).values(cell.canonical(), "its config.yaml").key() == key


def test_a_cell_is_its_own_training_scoring_and_adapters():
    cell = Parser(CellConfig).values({"max_steps": 3, "batch_size": 2, "eval_limit": 5, "lora_r": 2}, "a cell")
    assert cell.examples_needed == 6
    assert part_of(TrainingSettings, cell) == part_of(TrainingSettings, TrainingSettings(max_steps=3, batch_size=2))
    assert part_of(ScoringSettings, cell) == part_of(ScoringSettings, ScoringSettings(eval_limit=5))
    assert part_of(LoraSettings, cell) == part_of(LoraSettings, LoraSettings(lora_r=2))


def test_what_a_mask_file_says_of_itself_is_not_judged():
    """It may have been made with an importance of one's own."""
    CellConfig(masks="mine.safetensors", importance="mine", method="structured", scope="row").check()


def test_cells_that_differ_in_nothing_masks_depend_on_share_a_mask_set():
    cell = CellConfig(importance="wanda", seed=3)
    kind = mask_set_of(cell)
    assert kind == mask_set_of(replace(cell, lora_r=3, max_steps=7, sparsity=0.9, output_dir="elsewhere"))
    assert (kind.importance, kind.seed, kind.task, kind.sparsities) == ("wanda", 3, "boolq", ())
    for change in ({"seed": 4}, {"task": "gsm8k"}, {"scope": "row"}, {"dtype": "float32"}, {"model": "tiny-llama"}):
        assert mask_set_of(replace(cell, **change)) != kind, change
    free = mask_set_of(CellConfig(seed=3, task="gsm8k", device="cuda:1", pattern="1:2", calibration_samples=3))
    assert free == mask_set_of(CellConfig()) and isinstance(free, MaskConfig)
    assert mask_set_of(CellConfig(mode="dense")) is mask_set_of(CellConfig(masks="a file")) is None
