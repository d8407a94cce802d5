"""Tests of reading rows: formats, separators, quotation marks, encodings, bad rows, and cells."""

from __future__ import annotations

import csv
import io
import logging
import shutil
import subprocess
import unicodedata

import pytest

from hf_mel.errors import DataFormatError, DuplicateIdError, ImageError
from hf_mel.row_files import (
    ENTITY_COLUMNS,
    bad_rows_error,
    entity_row,
    id_cell,
    image_file,
    int_cell,
    other_unicode_form,
    read_rows,
    texts_cell,
)


def read(folder, name, content, columns=None, **options):
    """Writes a file and returns its rows without their lines."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in read_rows(path, columns, **options)]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", '\ufeff{"a": "1", "b": "x"}\r\n\r\n{"a": "2", "b": "é"}'),
        (".NDJSON", '{"a": "1", "b": "x"}\n{"a": "2", "b": "é"}'),
        (".json", '[{"a": "1", "b": "x"},\n {"a": "2", "b": "é"}]'),
        (".csv", "a,b\n1,x\n2,é\n"),
        (".tsv", "a\tb\r\n1\tx\r\n2\té"),
        # Spreadsheets of other countries and other programs write these.
        (".csv", "a;b\r\n1;x\r\n2;é\r\n"),
        (".csv", "\ufeffsep=;\r\na;b\r\n1;x\r\n2;é\r\n"),
        (".csv", '"sep=|"\na|b\n1|x\n2|é'),
        (".csv", "a\tb\n1\tx\n2\té\n"),
        (".tsv", "a,b\n1,x\n2,é\n"),
        (".CSV", '"a";"b"\n"1";"x"\n"2";"é"'),
        # Columns without a name, separators at the end, and rows without a value.
        (".csv", "\n , \na,b,,\n1,x,,\n,,,\n2,é,,,,\n,,\n"),
        (".csv", " a , b\n1,x\n2,é\n"),
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
    bad_rows = []
    with pytest.raises(DataFormatError):
        read(tmp_path, f"rows{suffix}", content, {"a": "a", "b": "b"}, required=["a"], bad_rows=bad_rows)
    assert bad_rows == []


def test_integer_cells_are_parsed(tmp_path):
    values = {"a": 3, "b": " -1 ", "c": "", "d": None}
    assert [int_cell(tmp_path, 1, values, column) for column in "abcde"] == [3, -1, None, None, None]
    for bad in (True, 1.0, "1.5", "1e3", "9" * 10, [1]):
        with pytest.raises(DataFormatError, match="'a' is"):
            int_cell(tmp_path, 1, {"a": bad}, "a")


def test_a_recognised_separator_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_mel")
    assert read(tmp_path, "rows.csv", "id;name\nQ1;Accra, Ghana\n", ENTITY_COLUMNS) == [
        {"id": "Q1", "name": "Accra, Ghana"}
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'rows.csv'}: fields are separated by semicolons."
    ]


def test_known_columns_decide_between_separators(tmp_path):
    """A comma in one of the names of a table with semicolons does not hide its columns, and the reverse."""
    assert read(tmp_path, "a.csv", 'id;name;"aliases"\nQ1;Lee, Ann;x\n', ENTITY_COLUMNS)[0]["name"] == "Lee, Ann"
    columns = {**ENTITY_COLUMNS, "a,b": "b"}
    assert read(tmp_path, "b.csv", "id;a,b;name\nQ1;x;Ann\n", columns) == [{"id": "Q1", "b": "x", "name": "Ann"}]
    assert read(tmp_path, "c.csv", "id,name\nQ1,x;y\n", ENTITY_COLUMNS) == [{"id": "Q1", "name": "x;y"}]
    assert read(tmp_path, "d.csv", "text,a;b;c\nx,1;2;3\n") == [{"text": "x", "a;b;c": "1;2;3"}]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        # Fields of a file without quoting, whose quotation marks are text.
        (['"Gold Coast" of old', "state"], ['"Gold Coast" of old', "state"]),
        (['"A', 'B"'], ['"A', 'B"']),
        (['say "x"', '"'], ['say "x"', '"']),
        (['"whole"', '"in part" only'], ['"whole"', '"in part" only']),
        # Fields that are quoted as in CSV.
        (['"whole"', "state"], ["whole", "state"]),
        (['"said ""no"""', '"with\ttab"'], ['said "no"', "with\ttab"]),
        (['"two\nlines"', "state"], ["two\nlines", "state"]),
    ],
)
def test_quotation_marks_of_tsv_files(tmp_path, cells, expected):
    content = "id\tname\n" + "".join(f"{k}\t{cell}\n" for k, cell in enumerate(cells))
    assert [row["name"] for row in read(tmp_path, "rows.tsv", content)] == expected


def test_a_tsv_file_that_is_quoted_only_in_part_has_bad_rows(tmp_path):
    """Nothing says whether the marks of the last row are text or quoting that went wrong."""
    bad_rows = []
    content = 'id\tname\n0\t"said ""no"""\n1\t"Gold Coast" of old\n'
    assert [row["id"] for row in read(tmp_path, "rows.tsv", content, bad_rows=bad_rows)] == ["0"]
    assert [error.row for error in bad_rows] == [3]
    assert '"""Gold Coast"" of old"' in bad_rows[0].remedy


def test_a_quoted_cell_can_hold_anything(tmp_path):
    """The standard library's writer is the reference."""
    table = [["id", "name"], ["1", 'x;y,z\t"\r\n'], ["2", "sep=;"], ["3", "\u2028"], ["4", '"']]
    for dialect, name in (({}, "a.csv"), ({"delimiter": ";"}, "b.csv"), ({"delimiter": "\t"}, "c.tsv")):
        file = io.StringIO()
        csv.writer(file, **dialect).writerows(table)
        rows = read(tmp_path, name, file.getvalue(), ENTITY_COLUMNS)
        assert [[row["id"], row["name"]] for row in rows] == table[1:]


def test_a_value_without_a_column_name_is_a_bad_row(tmp_path):
    with pytest.raises(DataFormatError, match="Column 3 has the value 'y', but no name") as caught:
        read(tmp_path, "rows.csv", "a,b,\n1,x,\n2,é,y\n")
    assert caught.value.row == 3
    with pytest.raises(DataFormatError, match="4 fields, not the 2"):
        read(tmp_path, "rows.csv", "a,b\n1,x,,y\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_the_error_of_an_encoding_names_the_one_that_fits(tmp_path, encoding):
    """The command that the error gives makes a file that can be read."""
    text = "id,name\nQ1,Lomé – „Lomé“\n"
    with pytest.raises(DataFormatError) as caught:
        read(tmp_path, "my rows.csv", text.encode(encoding))
    assert (caught.value.file, caught.value.row) == (tmp_path / "my rows.csv", 2 if encoding == "cp1252" else 1)
    if encoding == "cp1252":
        assert "Read as Windows-1252, this line has 'Q1,Lomé – „Lomé“'" in caught.value.message
    if shutil.which("iconv"):
        command = caught.value.remedy.partition("or run: ")[2]
        subprocess.run(command, shell=True, check=True)
        assert [row["name"] for _, row in read_rows(tmp_path / "my rows-utf8.csv")] == ["Lomé – „Lomé“"]


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path):
    with pytest.raises(DataFormatError, match=r"not UTF-8 text .*Save it as UTF-8") as caught:
        read(tmp_path, "rows.csv", "id,name\nQ1,Lomé\n".encode() + b"Q2,Lom\xe9\n")
    assert caught.value.row == 3
    assert "1252" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '[\n{"id": 1}\n]', "name such a file .json"),
        ("a.json", '{"id": 1}\n{"id": 2}\n', "one object a line .jsonl"),
        (
            "a.json",
            '{"head": {"vars": []}, "results": {"bindings": []}}',
            "SPARQL results.*Download the results as CSV",
        ),
        ("a.xlsx", "", r"not one of \.jsonl, \.json, \.csv, \.tsv, \.ndjson"),
    ],
)
def test_a_file_of_another_format_is_told_what_it_is(tmp_path, name, content, message):
    with pytest.raises(DataFormatError, match=f"(?i){message}"):
        read(tmp_path, name, content)


def test_ids_that_look_the_same_are_the_same(tmp_path):
    lome = "Lom\u00e9"
    ids = [" Q1", "Q1\u00a0", "Q1\t", unicodedata.normalize("NFD", lome), lome, 7, "7"]
    assert [id_cell(tmp_path, 1, {"id": value}, "id") for value in ids] == ["Q1", "Q1", "Q1", lome, lome, "7", "7"]
    addresses = ["http://www.wikidata.org/entity/Q42", "https://www.wikidata.org/wiki/Q42 "]
    assert [id_cell(tmp_path, 1, {"id": value}, "id") for value in addresses] == ["Q42", "Q42"]
    for other in ("http://www.wikidata.org/entity/P31", "http://example.org/entity/Q42"):
        assert id_cell(tmp_path, 1, {"id": other}, "id") == other
    assert texts_cell(tmp_path, 1, {"aliases": [" a", "", " ", "b "]}, "aliases") == ["a", "b"]


def test_the_unicode_form_of_a_mention(tmp_path):
    composed, decomposed = "in Lom\u00e9", "in Lome\u0301"
    assert "the mention NFC, the text NFD" in other_unicode_form(decomposed, composed[3:])
    assert "the mention NFD, the text NFC" in other_unicode_form(composed, decomposed[3:])
    assert other_unicode_form(composed, composed[3:]) is None
    assert other_unicode_form(composed, "Accra") is None


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("Turner, Joseph Mallord William", ["Joseph Mallord William Turner"]),
        ("Barret, George, Senior", ["George Barret, Senior"]),
        ("Canaletto", []),
        ("Art & Language (Ian Burn, born 1939)", []),
        ("Turner,", []),
    ],
)
def test_inverted_names_are_aliases_the_right_way_round(tmp_path, name, aliases):
    row = {"id": "1", "name": name}
    assert entity_row(tmp_path, 1, row, inverted_names=True)["aliases"] == aliases
    assert entity_row(tmp_path, 1, row)["aliases"] == []
    row["aliases"] = ["JMW", *aliases]
    assert sorted(entity_row(tmp_path, 1, row, inverted_names=True)["aliases"]) == sorted(["JMW", *aliases])


def test_an_address_is_no_image_file(tmp_path):
    with pytest.raises(ImageError, match=r"is an address, not a file.*--column image="):
        image_file(tmp_path / "a.csv", 2, "http://commons.wikimedia.org/wiki/Special:FilePath/Flag.svg")


def test_many_bad_rows_are_one_error():
    errors = [DataFormatError(f"m{k}.", file="a.csv", row=k) for k in range(30)]
    assert bad_rows_error(errors[:1]) is errors[0]
    combined = bad_rows_error(errors)
    assert (combined.file, combined.row) == ("a.csv", None)
    assert str(combined).splitlines() == [
        "a.csv: 30 rows cannot be used:",
        *(f"  row {k}: m{k}." for k in range(20)),
        "  … and 10 more",
    ]
    combined = bad_rows_error([errors[1], DataFormatError("n.", file="b.csv", row=1, remedy="Do.")])
    assert str(combined) == "2 rows cannot be used:\n  a.csv, row 1: m1.\n  b.csv, row 1: n. Do."
    assert type(bad_rows_error([DuplicateIdError("a"), DuplicateIdError("b")])) is DuplicateIdError
    assert type(bad_rows_error([DuplicateIdError("a"), ImageError("b")])) is DataFormatError
