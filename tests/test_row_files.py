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


@pytest.mark.parametrize(
    ("suffix", "content", "good", "bad"),
    [
        (".jsonl", '{"a": 1}\n{"a": \n[2]\n{"a": 3, "a": 3}\n{"a": "\\ud800"}\n{"a": 6}\n', [1, 6], [2, 3, 4, 5]),
        (".json", '[{"a": 1}, 2, {"a": 3, "a": 3}, {"a": "\\ud800"}, {"a": 5}]', [1, 5], [2, 3, 4]),
        (".csv", 'a,b\n2,x\n3\n4,x,y\n5,"x" y\n6,x\n', [2, 6], [3, 4, 5]),
        # The quotation mark on line 3 is closed by the one on line 4, so that both lines are one row.
        (".csv", 'a,b\n2,x\n3,"x\n4,"x"\n5,x\n6,"x', [2, 5], [4, 6]),
        (".tsv", "a\tb\n2\tx\n3\n4\tx\n", [2, 4], [3]),
    ],
)
def test_reading_goes_on_after_a_bad_row(tmp_path, suffix, content, good, bad):
    """All good rows are read and every bad row is named; without a list, the first bad row ends the reading."""
    path = tmp_path / f"rows{suffix}"
    path.write_text(content)
    bad_rows = []
    assert [(line, int(row["a"])) for line, row in read_rows(path, bad_rows=bad_rows)] == [(n, n) for n in good]
    assert [(error.row, error.file) for error in bad_rows] == [(line, path) for line in bad]
    with pytest.raises(DataFormatError) as caught:
        list(read_rows(path))
    assert caught.value.row == bad[0]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", '[{"a": 1}'),
        (".json", '{"a": 1}'),
        (".csv", 'a,"b" c\n1,2\n'),
        (".csv", "a,typo\n1,2\n"),
        (".txt", ""),
    ],
)
def test_an_error_of_the_whole_file_is_raised_also_with_a_list(tmp_path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_text(content)
    bad_rows = []
    with pytest.raises(DataFormatError):
        list(read_rows(path, {"a": "a", "b": "b"}, bad_rows=bad_rows))
    assert bad_rows == []


def test_integer_cells_are_parsed(tmp_path):
    values = {"a": 3, "b": " -1 ", "c": "", "d": None}
    assert [int_cell(tmp_path, 1, values, column) for column in "abcde"] == [3, -1, None, None, None]
    for bad in (True, 1.0, "1.5", "1e3", "9" * 10, [1]):
        with pytest.raises(DataFormatError, match="'a' is"):
            int_cell(tmp_path, 1, {"a": bad}, "a")
