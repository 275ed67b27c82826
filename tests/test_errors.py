"""What no line may show."""

import pytest

from sparse_ft.errors import UserError, masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("postgresql+psycopg://me:p@ss/w%40rd'@db/x", "postgresql+psycopg://me:***@db/x"),
        ("redis://:secret@db", "redis://:***@db"),
        ("https://t0ken@server/mlflow", "https://***@server/mlflow"),
        ("mysql://db/x?user=me&password=secret&ssl=1", "mysql://db/x?user=me&password=***&ssl=1"),
        ("https://db/x?access_token=secret", "https://db/x?access_token=***"),
        ("host=db password=secret dbname=x", "host=db password=*** dbname=x"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("http://localhost:5000/#/experiments/1", "http://localhost:5000/#/experiments/1"),
        (
            "models:/name@sparse50, owner/name@commit, pad_token=3",
            "models:/name@sparse50, owner/name@commit, pad_token=3",
        ),
        ("sorted(runs, key=name)", "sorted(runs, key=name)"),
    ],
)
def test_passwords_and_tokens_are_masked_and_nothing_else_is(text, shown):
    assert masked(text) == shown
    assert str(UserError(f"cannot open {text}\n")) == f"cannot open {shown}"
