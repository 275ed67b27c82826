from sparse_ft.cell.merge_cost import merge_warning


def test_a_merge_that_costs_more_than_one_standard_error_is_said():
    said = merge_warning({"loss": 0.82}, {"loss": 1.05, "loss_stderr": 0.1})
    assert said == "merge_cost: the loss is 0.820 with the adapter and 1.050 merged (standard error 0.100)"


def test_a_merge_within_its_error_or_better_or_without_one_is_not():
    assert merge_warning({"loss": 1.0}, {"loss": 1.05, "loss_stderr": 0.1}) is None
    assert merge_warning({"loss": 1.0}, {"loss": 0.5, "loss_stderr": 0.1}) is None
    assert merge_warning({"loss": 1.0}, {"loss": 9.0}) is None
    assert merge_warning({}, {"loss": 9.0, "loss_stderr": 0.1}) is None
