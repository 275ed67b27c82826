"""How requests are laid out in rows."""

import torch

from sparse_ft.evaluation.rows import branched_rows, model_inputs, single_rows

REQUESTS = [
    ("a", [1, 2, 3], [4, 5]),
    ("b", [1, 2, 3], [6, 7, 8]),
    ("c", [1, 2, 3], [4, 9]),
    ("d", [1, 2], [3, 4, 5]),
    ("e", [7], [8]),
]


def test_single_rows_share_what_differs_in_the_last_token():
    rows = single_rows(REQUESTS, 100)
    assert [row.tokens for row in rows] == [(1, 2, 3, 6, 7), (1, 2, 3, 4), (7,)]
    assert rows[0].reads == ((1, (2, 3, 4)),)
    assert rows[1].reads == ((0, (2, 3)), (2, (2, 3)), (3, (1, 2, 3)))
    assert rows[2].reads == ((4, (0,)),)


def test_single_rows_are_cut_on_the_left():
    rows = single_rows(REQUESTS[1:2], 3)
    assert rows[0].tokens == (3, 6, 7) and rows[0].reads == ((0, (0, 1, 2)),)


def test_branches_go_on_from_the_context():
    rows = branched_rows(REQUESTS, 100)
    first = rows[0]
    assert first.tokens == (1, 2, 3, 4, 6, 7, 4) and first.context == 3
    assert first.reads == ((0, (2, 3)), (1, (2, 4, 5)), (2, (2, 6)))
    assert [row.tokens for row in rows[1:]] == [(1, 2, 3, 4), (7,)] and not any(row.branches for row in rows[1:])
    inputs = model_inputs(rows, torch.float32)
    assert inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 3, 4, 3]
    seen = (inputs["attention_mask"][:, 0] == 0).int()
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 1],
    ]
    assert torch.equal(seen[1], torch.ones(7, 7, dtype=torch.int32).tril())


def test_what_does_not_fit_stands_alone():
    assert branched_rows(REQUESTS, 5) == single_rows(REQUESTS, 5)


def test_plain_rows_need_no_mask():
    inputs = model_inputs(single_rows(REQUESTS, 100), torch.float32)
    assert list(inputs) == ["input_ids"]
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 6, 7], [1, 2, 3, 4, 0], [7, 0, 0, 0, 0]]
