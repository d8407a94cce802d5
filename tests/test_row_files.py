"""Tests of reading rows with any columns, and of integer cells."""

from __future__ import annotations

import pytest

from hf_mel.errors import DataFormatError
from hf_mel.row_files import int_cell, read_rows


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", '\ufeff{"a": "1", "b": "x"}\r\n\r\n{"a": "2", "b": "é"}'),
        (".json", '[{"a": "1", "b": "x"},\n {"a": "2", "b": "é"}]'),
        (".csv", "a,b\n1,x\n2,é\n"),
        (".tsv", "a\tb\r\n1\tx\r\n2\té"),
    ],
)
def test_all_columns_keep_their_names(tmp_path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content.encode())
    assert [row for _, row in read_rows(path)] == [{"a": "1", "b": "x"}, {"a": "2", "b": "é"}]


def test_nested_values_are_plain_python(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": {"b": [{"c": 1}]}}\n')
    assert list(read_rows(path)) == [(1, {"a": {"b": [{"c": 1}]}})]


@pytest.mark.parametrize(
    ("suffix", "content", "line"),
    [(".jsonl", '{"a": 1}\n{"a": 1, "a": 2}', 2), (".json", '[{"a": 1, "a": 2}]', 1), (".csv", "a,a\n", 1)],
)
def test_a_repeated_column_is_an_error(tmp_path, suffix, content, line):
    path = tmp_path / f"rows{suffix}"
    path.write_text(content)
    with pytest.raises(DataFormatError, match="'a' twice") as caught:
        list(read_rows(path))
    assert caught.value.row == line


def test_integer_cells_are_parsed(tmp_path):
    values = {"a": 3, "b": " -1 ", "c": "", "d": None}
    assert [int_cell(tmp_path, 1, values, column) for column in "abcde"] == [3, -1, None, None, None]
    for bad in (True, 1.0, "1.5", "1e3", "9" * 10, [1]):
        with pytest.raises(DataFormatError, match="'a' is"):
            int_cell(tmp_path, 1, {"a": bad}, "a")
