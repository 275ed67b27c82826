"""What transformers answers is kept by the question and by the code that answered: no answer stands for another's."""

import json
import os
import subprocess
import sys

import pytest

from sparse_ft.models import skeleton
from sparse_ft.models.skeleton import build_skeleton, config_values

ASKS = (
    "import sys, json; from sparse_ft.models.skeleton import build_skeleton, config_values;"
    "values = config_values(sys.argv[1]); tensors = build_skeleton(values).tensors;"
    "print(json.dumps([values['head_dim'], tensors['model.layers.0.self_attn.q_proj.weight'],"
    " 'transformers' in sys.modules]))"
)


@pytest.fixture
def folders(tiny_model, tmp_path):
    """Two models' configurations that differ in one number that the tensors' shapes follow."""
    content = json.loads((tiny_model("tiny-llama") / "config.json").read_text())
    made = []
    for heads in (content["num_attention_heads"], 2 * content["num_attention_heads"]):
        folder = tmp_path / f"heads{heads}"
        folder.mkdir()
        changed = content | {"num_attention_heads": heads, "head_dim": content["head_dim"]}
        (folder / "config.json").write_text(json.dumps(changed))
        made.append(folder)
    return made


def ask(folder, cache):
    """Head dimension, a tensor's shape, and whether transformers was imported for them, in a process of its own."""
    env = os.environ | {"SPARSE_FT_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", ASKS, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_each_configuration_has_its_own_answer_and_is_asked_for_once(folders, tmp_path):
    small, large = (ask(folder, tmp_path / "cache") for folder in folders)
    assert small[2] and large[2]
    assert 2 * small[1][0] == large[1][0] and small[1][1] == large[1][1]
    again = [ask(folder, tmp_path / "cache") for folder in folders]
    assert again == [[*small[:2], False], [*large[:2], False]]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered by this process."""
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))
    skeleton._values.cache_clear()
    return tmp_path / "cache"


@pytest.mark.parametrize("changed", ["version", "code"])
def test_another_transformers_is_asked_again(changed, folders, cache, monkeypatch):
    first = config_values(folders[0])
    kept = set((cache / "transformers").iterdir())
    version, files = skeleton._answering("llama")
    other = ["0.0", files] if changed == "version" else [version, [*files, ("new.py", 1, 1)]]
    monkeypatch.setattr(skeleton, "_answering", lambda kind: other)
    skeleton._values.cache_clear()
    assert config_values(folders[0]) == first
    assert len(set((cache / "transformers").iterdir()) - kept) == 1


@pytest.mark.parametrize("damage", ["no JSON", "no folder"])
def test_without_a_cache_that_can_be_used_transformers_answers(damage, folders, cache, monkeypatch):
    right = config_values(folders[0])
    if damage == "no JSON":
        for file in (cache / "transformers").iterdir():
            file.write_text("{")
    else:
        monkeypatch.setenv("SPARSE_FT_CACHE", str(folders[0] / "config.json"))
    skeleton._values.cache_clear()
    assert config_values(folders[0]) == right


def test_what_is_changed_in_an_answer_is_not_changed_in_the_next(folders):
    values = config_values(folders[0])
    values["head_dim"] = -1
    assert config_values(folders[0])["head_dim"] > 0
    assert build_skeleton(config_values(folders[0])).tied == build_skeleton(config_values(folders[1])).tied
