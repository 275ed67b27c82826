import pytest

from sparse_ft.study.worker import beyond_work


def test_every_kind_of_scoring_is_work_and_the_rest_is_beyond_it():
    stages = {"load": 1, "eval_untuned": 2, "train": 4, "eval_adapter": 8, "merge": 16, "eval": 32, "eval_remasked": 64}
    stages |= {"recover": 3, "measure": 5}
    metrics = {f"time/{stage}_seconds": seconds for stage, seconds in stages.items()} | {"eval/accuracy": 0.5}
    assert beyond_work(200, metrics) == pytest.approx(200 - 2 - 4 - 8 - 32 - 64 - 3 - 5)
