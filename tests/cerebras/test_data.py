from dataclasses import dataclass

import h5py
import numpy as np
import pytest

from sparse_ft.cerebras.data import read_examples, write_examples
from sparse_ft.errors import UserError


@dataclass
class Example:
    input_ids: list[int]
    answer_start: int


EXAMPLES = [Example([1, 10, 11, 12, 13, 2], 4), Example([1, 20, 21], 1), Example([1, 30, 31, 32, 33, 34, 35, 2], 6)]


def test_position_i_predicts_the_next_token_and_only_answers_count(tmp_path):
    assert write_examples(EXAMPLES, tmp_path / "d", seq_len=8, pad_token_id=0) == 3
    rows = list(read_examples(tmp_path / "d"))
    for example, (ids, mask, labels) in zip(EXAMPLES, rows, strict=True):
        count = len(example.input_ids) - 1
        assert ids[:count].tolist() == example.input_ids[:-1]
        assert labels[:count].tolist() == example.input_ids[1:]
        assert labels[mask == 1].tolist() == example.input_ids[example.answer_start :]
        assert not ids[count:].any() and not mask[count:].any() and not labels[count:].any()


def test_the_file_is_modelzoos_format(tmp_path):
    write_examples(EXAMPLES, tmp_path / "d", seq_len=7, pad_token_id=5)
    (path,) = (tmp_path / "d").iterdir()
    with h5py.File(path) as file:
        assert file["data"].shape == (3, 3, 7) and file["data"].dtype == np.int32
        assert file.attrs["n_examples"] == 3


@pytest.mark.parametrize(
    "arguments, words",
    [({"seq_len": 6, "pad_token_id": 0}, "8 tokens"), ({"seq_len": 8, "pad_token_id": 0, "batch_size": 4}, "needs 4")],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        write_examples(EXAMPLES, tmp_path / "d", **arguments)
    assert not (tmp_path / "d").exists()
