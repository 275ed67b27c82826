import io

import pandas as pd
import pytest

from sparse_ft.analysis.spreadsheet import csv_text


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\n=1", " =1", '=HYPERLINK("http://x")', "-x"],
)  # fmt: skip
def test_no_text_is_a_formula(text):
    frame = pd.DataFrame({text: [text, "plain"], "mixed": [text, 3.5]})
    read = pd.read_csv(io.StringIO(csv_text(frame)), dtype=str)
    assert list(read.columns) == ["'" + text, "mixed"]
    assert list(read.iloc[0]) == ["'" + text] * 2
    assert list(read.iloc[1]) == ["plain", "3.5"]


def test_numbers_and_other_text_stay_as_they_are():
    frame = pd.DataFrame(
        {"loss": [-1.5, 2.0], "count": [-3, 4], "text": ["-1.5", "+3"], "name": ["a=b", None], "ok": [True, False]}
    )
    assert csv_text(frame) == "loss,count,text,name,ok\n-1.5,-3,-1.5,a=b,True\n2.0,4,+3,,False\n"


@pytest.mark.parametrize("text", ["\r=1", "a\r=1", "a\r\n=1"])
def test_no_line_break_in_a_text_begins_a_row(text):
    written = csv_text(pd.DataFrame({"name": [text], "other": [1]}))
    (row,) = pd.read_csv(io.StringIO(written)).to_dict("records")
    assert row["name"].lstrip("'") == text.replace("\r\n", "\n").replace("\r", "\n") and row["other"] == 1
    assert "\r" not in written


def test_categories_and_dates_are_text_too():
    frame = pd.DataFrame({"kind": pd.Categorical(["=1", "b"]), "when": pd.to_datetime(["2024-01-01", "2024-01-02"])})
    assert csv_text(frame).splitlines()[1] == "'=1,2024-01-01"
