"""A study small enough for a test: a tiny model, made-up questions, two steps."""

import pytest
import yaml

SMALL = {
    "data_dir": "made",
    "lora_r": 2,
    "max_steps": 2,
    "batch_size": 2,
    "eval_limit": 4,
    "eval_batch_size": 4,
    "perplexity_tokens": 256,
    "perplexity_seq_len": 64,
}


@pytest.fixture
def small():
    """Cell values under which a cell takes a second or two."""
    return dict(SMALL)


@pytest.fixture
def study_file(tmp_path):
    """Writes a study with the small cell values; returns its path."""

    def write(grid, name="small", cell=None, **rest):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "grid": grid, "cell": {**SMALL, **(cell or {})}, **rest}))
        return path

    return write
