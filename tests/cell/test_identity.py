"""Results go by what is behind their names: over random cells, keys differ exactly where something does."""

import itertools
import json
import random
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from sparse_ft.analysis.table import GROUP, cell_table
from sparse_ft.cell.identity import cell_identity, cell_key, check_identity, mask_key, recovery_parts, untuned_key
from sparse_ft.cell.workbench import Workbench
from sparse_ft.errors import UserError
from sparse_ft.settings.cell import CellConfig, mask_set_of
from sparse_ft.settings.commands import MaskConfig
from sparse_ft.settings.field import part_of
from sparse_ft.settings.scoring import ScoringSettings
from sparse_ft.tasks.made import made_data_dir
from sparse_ft.tracking.parameters import flatten_config
from sparse_ft.tracking.record import Run

# value of a field -> what it means; two values of one meaning make the same result
AXES = {
    "model": {"same": 0, "copy": 0, "other_head": 1, "other_rope": 2},
    "data_dir": {"same": 0, "copy": 0, "other_question": 1, "other_training": 2},
    "device": {"auto": 0, "cpu": 0},
    "dtype": {"auto": 0, "float32": 0, "bfloat16": 1},
    "num_fewshot": {None: 0, 0: 0, 1: 1},
    "mode": dict(zip(modes := ("dense", "sparse_to_dense", "sparse_to_sparse", "full", "pruned"), modes, strict=True)),
    "method": dict(zip(methods := ("unstructured", "random", "semi_structured"), methods, strict=True)),
    "importance": {"magnitude": 0, "wanda": 1},
    "update": {"auto": 0, "none": 0, "sparsegpt": 1, "refit": 2},  # none is the importances' own
    "refine": {"none": 0, "swaps": 1},
    "reconstruct": {"none": 0, "block": 1},
    "reconstruct_epochs": {10: 0, 2: 1},
    "pattern": {"2:4": 0, "1:2": 1},
    "calibration_corpus": {"task": 0, "book.txt": 1, "copy.txt": 1, "other.txt": 2},
    "calibration_samples": {4: 0, 8: 1},
    "seed": {0: 0, 1: 1},
    "lora_r": {4: 0, 8: 1},
    "batch_size": {1: 0, 16: 1},
    "output_dir": {"a": 0, "b": 0},
    "keep": {"none": 0, "adapter": 0},
}


def _changed(folder, target, change):
    shutil.copytree(folder, target)
    change(target)


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model):
    """The folders that the values of ``model`` and ``data_dir`` stand for."""
    root = tmp_path_factory.mktemp("identity")

    def head(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][3, 3] += 1  # tied: the head too
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def rope(folder):
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
        (folder / "config.json").write_text(json.dumps(config))

    def row(file):
        def change(folder):
            lines = (folder / "boolq" / file).read_text().splitlines()
            first = json.loads(lines[0])
            lines[0] = json.dumps({**first, "answer": not first["answer"]})
            (folder / "boolq" / file).write_text("\n".join(lines) + "\n")

        return change

    kinds = {"same": lambda _: None, "copy": lambda _: None}
    for name, change in (kinds | {"other_head": head, "other_rope": rope}).items():
        _changed(tiny_model("tiny-llama"), root / "models" / name, change)
    for name, change in (
        kinds | {"other_question": row("validation.jsonl"), "other_training": row("train.jsonl")}
    ).items():
        _changed(made_data_dir(), root / "data" / name, change)
    for name, text in (
        ("book.txt", "One book. " * 400),
        ("copy.txt", "One book. " * 400),
        ("other.txt", "Two. " * 900),
    ):
        (root / name).write_text(400 * text)
    return {"model": root / "models", "data_dir": root / "data", "calibration_corpus": root}


@pytest.fixture(scope="module")
def bench():
    return Workbench()


@pytest.fixture(scope="module")
def cells(places):
    """Random cells, and what each one's values mean."""
    draw = random.Random(7)
    found = []
    for _ in range(250):
        chosen = {name: draw.choice(list(values)) for name, values in AXES.items()}
        meaning = {name: AXES[name][value] for name, value in chosen.items()}
        values = {name: str(places[name] / v) if name in places and v != "task" else v for name, v in chosen.items()}
        found.append((CellConfig(**values, sparsity=0.5), meaning))
    return found


def _masks_mean(meaning):
    """An oracle of its own for what masks depend on; None where there are none."""
    if meaning["mode"] == "dense":
        return None
    model, method, seed = (meaning[name] for name in ("model", "method", "seed"))
    steps = meaning["refine"], meaning["update"], meaning["reconstruct"] * (1 + meaning["reconstruct_epochs"])
    ranked = None if method == "random" else meaning["importance"]
    grouped = meaning["pattern"] if method == "semi_structured" else None
    if not ranked and not any(steps):
        return (model, method, seed) if method == "random" else (model, method, grouped)
    # Of the task's texts calibration reads the training split.
    text = meaning["calibration_corpus"] or (meaning["data_dir"] == 2) - 1
    return model, method, grouped, ranked, steps, text, meaning["calibration_samples"], meaning["dtype"], seed


def _result_means(meaning):
    names = ("model", "dtype", "num_fewshot", "mode", "seed")
    trained = meaning["batch_size"] if meaning["mode"] != "pruned" else None
    lora = None if meaning["mode"] in ("full", "pruned") else meaning["lora_r"]
    rows = meaning["data_dir"] if trained is not None or meaning["num_fewshot"] else meaning["data_dir"] == 1
    # The method and importance stand in the name of a result, whatever the masks turn out to be.
    named = None if meaning["mode"] == "dense" else meaning["method"]
    ranked = meaning["importance"] if named in ("unstructured", "semi_structured") else None
    return (*(meaning[name] for name in names), rows, trained, lora, named, ranked, _masks_mean(meaning))


def _untuned_means(meaning):
    scored = meaning["data_dir"] if meaning["num_fewshot"] else meaning["data_dir"] == 1
    return meaning["model"], scored, meaning["dtype"], meaning["num_fewshot"], _masks_mean(meaning)


def _one_to_one(pairs):
    """Two keys are equal exactly where two meanings are."""
    pairs = set(pairs)
    assert len({meaning for meaning, _ in pairs}) > 10
    for (left, right), (other, its) in itertools.combinations(pairs, 2):
        assert (left == other) == (right == its), (left, other)


def _of_masks(cell, bench):
    kind = mask_set_of(cell)
    return "" if kind is None else mask_key(replace(kind, sparsities=(0.5,)), bench)


def test_keys_of_mask_sets(cells, bench):
    _one_to_one((_masks_mean(meaning), _of_masks(cell, bench)) for cell, meaning in cells)


def test_a_key_of_masks_speaks_of_nothing_that_was_not_there_when_it_was_made(bench, monkeypatch):
    monkeypatch.setattr("sparse_ft.cell.identity.digest", lambda value, length=16: value)
    values, _ = mask_key(MaskConfig(model="tiny-llama"), bench)
    assert set(values) == {"method", "importance", "scope", "pattern", "allocation", "calibration_samples",
                           "calibration_seq_len", "seed", "format", "levels"}  # fmt: skip
    more, _ = mask_key(MaskConfig(model="tiny-llama", refine="swaps", update="refit", reconstruct="block",
                                  reconstruct_epochs=3, data_dir="made"), bench)  # fmt: skip
    assert more == values | {"refine": "swaps", "update": "refit", "reconstruct": "block", "reconstruct_epochs": 3}


def test_keys_of_cells(cells, bench):
    _one_to_one(
        (_result_means(meaning), cell_key(cell, cell_identity(cell, bench), _of_masks(cell, bench)))
        for cell, meaning in cells
    )


def test_a_result_of_another_trainer_is_another_result(cells, bench):
    cell = cells[0][0]
    here, there = cell_identity(cell, bench), cell_identity(cell, bench, "cerebras")
    assert there == here | {"trainer": "cerebras"}
    assert cell_key(cell, here) != cell_key(cell, there)
    runs = []
    for number, identity in enumerate((here, there)):
        params = flatten_config(cell.canonical()) | flatten_config(identity, "identity")
        tags = {"kind": "cell", "cell_key": cell_key(cell, identity)}
        runs.append(Run(str(number), status="FINISHED", params=params, metrics={"eval/accuracy": 0.5}, tags=tags))
    rows = cell_table(runs).to_dict("records")
    assert len({tuple(str(row[name]) for name in (*GROUP, "seed")) for row in rows}) == 2


def test_keys_of_scores_before_fine_tuning(cells, bench):
    def key(cell):
        settings = part_of(ScoringSettings, cell)
        start = bench.checkpoint(cell.model).fingerprint
        return untuned_key(cell, cell_identity(cell, bench), start, _of_masks(cell, bench), settings)

    _one_to_one((_untuned_means(meaning), key(cell)) for cell, meaning in cells)


def test_rows_of_the_table(cells, bench):
    """What differs in anything but the seed stands in another row: no average mixes it."""
    runs = []
    for number, (cell, _) in enumerate(cells):
        identity = cell_identity(cell, bench)
        params = flatten_config(cell.canonical()) | flatten_config(identity, "identity")
        tags = {"kind": "cell", "cell_key": cell_key(cell, identity, _of_masks(cell, bench))}
        runs.append(Run(str(number), status="FINISHED", params=params, metrics={"eval/accuracy": 0.5}, tags=tags))
    table = cell_table(runs)
    places = {}
    for row in table.to_dict("records"):
        meaning = _result_means(cells[int(row["run_id"])][1])
        places.setdefault(tuple(str(row[name]) for name in (*GROUP, "seed")), set()).add(meaning)
    assert all(len(meanings) == 1 for meanings in places.values())


def test_a_worker_refuses_what_is_not_what_was_planned(places, bench):
    planned = CellConfig(model=str(places["model"] / "same"), data_dir=str(places["data_dir"] / "same"))
    here = cell_identity(planned, bench)
    for changed in (
        replace(planned, model=str(places["model"] / "other_head")),
        replace(planned, data_dir=str(places["data_dir"] / "other_question")),
    ):
        with pytest.raises(UserError, match="not what the study was planned with"):
            check_identity(here, cell_identity(changed, bench), "cell")
    check_identity(here, here | {"device": "cuda", "dtype": "bfloat16"}, "cell")  # the driver may have no GPU
    check_identity({}, here, "cell")


def test_a_corpus_is_known_by_its_text_and_by_how_it_is_drawn_and_not_by_its_name(places, bench, tmp_path):
    text = "One book. " * 400
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
    names = [*(str(places["calibration_corpus"] / name) for name in ("book.txt", "copy.txt", "other.txt"))]
    cells = [
        CellConfig(model="tiny-llama", data_dir="made", importance="wanda", scope="row", calibration_corpus=name,
                   recover_steps=2, recover_corpus=name)
        for name in (*names, str(tmp_path / "rows.jsonl"))
    ]  # fmt: skip
    identities = [cell_identity(cell, bench) for cell in cells]
    for keys in (
        [_of_masks(cell, bench) for cell in cells],
        [cell_key(cell, identity) for cell, identity in zip(cells, identities, strict=True)],
        [json.dumps(recovery_parts(cell, identity)) for cell, identity in zip(cells, identities, strict=True)],
    ):
        assert keys[0] == keys[1] and len(set(keys)) == 3
