"""A run's record: what it says of itself, and the names that stores hold."""

import pytest

from sparse_ft.tracking.record import Kind, Run, Tag, best_name, by_level, level_tag


def test_no_two_tags_and_no_two_kinds_have_one_name():
    # Of two members of one value an enumeration makes one.
    for names in (Tag, Kind):
        assert len(set(names)) == len(names.__members__) > 0


@pytest.mark.parametrize(("sparsity", "label"), [(0.0, "0"), (0.7, "70"), (0.125, "12.5"), (1 / 3, "33.33333333")])
def test_the_tag_of_a_level_is_read_back(sparsity, label):
    tags = {level_tag(Tag.MASK_CHECKSUM, sparsity): "abc", level_tag(Tag.BLOCK_SPARSITY, sparsity): "[0.1]"}
    assert tags == {f"mask_checksum_{label}": "abc", f"block_sparsity_{label}": "[0.1]"}
    tags |= {"mask_checksum": "of a cell", "warning": "mask_checksum_50"}
    for family, said in ((Tag.MASK_CHECKSUM, "abc"), (Tag.BLOCK_SPARSITY, "[0.1]")):
        assert list(by_level(tags, family).items()) == [(pytest.approx(sparsity, abs=1e-10), said)]


def test_names_are_the_stores_in_whatever_text_they_stand():
    assert f"tags.{Tag.KIND} = '{Kind.STOPPED_TRIAL}'" == "tags.kind = 'stopped trial'"
    assert best_name("lora_r") == "best/lora_r" and f"tags.`{Tag.PARENT}`" == "tags.`mlflow.parentRunId`"


def test_a_run_that_says_nothing_of_itself():
    run = Run("0")
    assert (run.kind, run.is_finished, run.seconds, run.same_as, run.is_superseded) == (None, False, None, None, False)
    assert (run.cell_key, run.driver, run.folder) == ("", "", "")


def test_a_run_says_what_its_tags_say():
    tags = {"kind": "cell", "cell_key": "k", "same_as": "1", "superseded": "l", "driver": "here 7 0", "folder": "/out"}
    run = Run("0", status="FINISHED", start_time=2.0, end_time=5.5, tags=tags)
    assert run.kind == Kind.CELL and run.is_finished and run.seconds == 3.5
    assert (run.cell_key, run.same_as, run.driver, run.folder) == ("k", "1", "here 7 0", "/out") and run.is_superseded
