"""The folders that are known without a search."""

from sparse_ft.tasks import finding


def test_known_folders_hold_the_tasks():
    assert all((finding.LM_EVAL_TASKS / folder).is_dir() for folder in finding._FOLDERS.values())
