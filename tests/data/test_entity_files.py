"""Tests of files of entities."""

from __future__ import annotations

import datetime
import json

import pytest
from PIL import Image

from hf_mel.data.entity_files import check_entity_file, check_entity_rows, read_entity_file
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    MelError,
)
from hf_mel.row_columns import ColumnMapping
from hf_mel.schema import entity_features
from tests.data.test_images import huge, photo
from tests.dataset_scripts.fixtures import picture


@pytest.fixture
def read_entities(tmp_path):
    """Returns a function that writes a file of entities next to an image, and reads it."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(picture("red"))

    def read(content, suffix=".jsonl"):
        path = tmp_path / f"entities{suffix}"
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_entity_file(path)

    return read


FULL = {
    "entity_id": "E1",
    "name": "Ada, Countess",
    "description": "d\u2028e",
    "attributes": "Sex: female.",
    "aliases": ["Ada", "A. F."],
}


def test_entities_are_read_from_jsonl(read_entities):
    rows = read_entities([{**FULL, "images": ["pictures/a.jpg"]}, {"id": 7, "name": "Seven", "description": None}])
    assert rows.features == entity_features()
    first = rows[0]
    assert first.pop("images")[0].size == (24, 16)
    assert first == FULL
    assert rows[1] == {
        "entity_id": "7",
        "name": "Seven",
        "description": "",
        "attributes": "",
        "aliases": [],
        "images": [],
    }


def test_csv_gives_the_same_rows(read_entities):
    text = 'id,name,description,attributes,aliases,image\nE1,"Ada, Countess",d\u2028e,Sex: female.,Ada| A. F.,'
    rows = read_entities(f"{text}pictures/a.jpg|pictures/a.jpg\n7,Seven,,,,\n", ".csv")
    first = rows[0]
    assert [image.size for image in first.pop("images")] == [(24, 16)] * 2
    assert first == FULL
    assert rows[1]["entity_id"] == "7"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_bom_and_windows_line_ends_are_accepted(read_entities, suffix):
    lines = {
        ".jsonl": ['{"id": "E1", "name": "n"}', "", '{"id": "E2", "name": "m"}'],
        ".csv": ["id,name", "E1,n", "E2,m"],
    }
    rows = read_entities(b"\xef\xbb\xbf" + "\r\n".join(lines[suffix]).encode(), suffix)
    assert [(row["entity_id"], row["name"]) for row in rows] == [("E1", "n"), ("E2", "m")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_very_long_texts_are_read_whole(read_entities, suffix):
    name, text = "n" * 10_000, "d" * 200_000
    content = [{"id": "E", "name": name, "description": text}] if suffix == ".jsonl" else None
    rows = read_entities(content or f"id,name,description\nE,{name},{text}\n", suffix)
    assert (rows[0]["name"], rows[0]["description"]) == (name, text)


def test_line_ends_in_quoted_csv_fields_are_kept(read_entities):
    rows = read_entities('id,name,description\nE1,n,"two\nlines"\nE2,m,\n', ".csv")
    assert [row["description"] for row in rows] == ["two\nlines", ""]


OK = '{"id": "E1", "name": "n"}\n'


@pytest.mark.parametrize(
    ("content", "suffix", "error", "row", "message"),
    [
        (OK + "\n{broken", ".jsonl", DataFormatError, 3, "is not JSON"),
        (OK + "[1]", ".jsonl", DataFormatError, 2, "not a JSON object"),
        (OK + '{"id": "E2"}', ".jsonl", DataFormatError, 2, "no 'name'"),
        (OK + '{"id": "E2", "name": "  "}', ".jsonl", DataFormatError, 2, "no 'name'"),
        (OK + '{"name": "n"}', ".jsonl", DataFormatError, 2, "no 'id'"),
        (OK + '{"id": "E2", "name": 5}', ".jsonl", DataFormatError, 2, "'name' is 5"),
        (OK + '{"id": true, "name": "n"}', ".jsonl", DataFormatError, 2, "'id' is True"),
        (OK + '{"id": "NIL", "name": "n"}', ".jsonl", DataFormatError, 2, "reserved for mentions"),
        (OK + '{"id": "E2", "name": "n", "aliases": [1]}', ".jsonl", DataFormatError, 2, "'aliases'"),
        (OK + '{"id": "E2", "name": "n", "image_path": "x"}', ".jsonl", DataFormatError, 2, "'image_path'"),
        (OK + '{"id": "E2", "entity_id": "E2", "name": "n"}', ".jsonl", DataFormatError, 2, "'entity_id' twice"),
        (OK + OK, ".jsonl", DuplicateIdError, 2, "that of line 1"),
        (
            OK + '{"id": "E2", "name": "n", "image": "gone.jpg"}',
            ".jsonl",
            ImageError,
            2,
            "image file .* does not exist",
        ),
        (
            OK + '{"id": "E2", "name": "n", "image": "pictures"}',
            ".jsonl",
            ImageError,
            2,
            "image file .* does not exist",
        ),
        ("", ".jsonl", KnowledgeBaseError, None, "no entities"),
        ("\n\n", ".jsonl", KnowledgeBaseError, None, "no entities"),
        ("", ".csv", KnowledgeBaseError, None, "no entities"),
        ("id,name\n", ".csv", KnowledgeBaseError, None, "no entities"),
        ("id,nam\nE,n\n", ".csv", DataFormatError, 1, "'nam'"),
        ("id,id,name\nE,E,n\n", ".csv", DataFormatError, 1, "'id' twice"),
        ("id,name\nE1,n\nE2,n,more\n", ".csv", DataFormatError, 3, "not the 2 of"),
        ("id,name\nE1,n\nE2\n", ".csv", DataFormatError, 3, "not the 2 of"),
        ('id,name\nE1,"n\n', ".csv", DataFormatError, 2, "is not CSV"),
        ("id,name\nE1,\n", ".csv", DataFormatError, 2, "no 'name'"),
        (b"\xff\xfe", ".jsonl", DataFormatError, 1, "UTF-8"),
        (b"[1,\n\xff", ".json", DataFormatError, 2, "UTF-8"),
        (OK + '{"id": "E2", "name": "\\ud800"}', ".jsonl", DataFormatError, 2, "surrogate"),
        (OK + '{"id": "E2", "name": "n", "aliases": NaN}', ".jsonl", DataFormatError, 2, "NaN"),
        (OK + '{"id": 1' + "0" * 5000 + ", ", ".jsonl", DataFormatError, 2, "is not JSON"),
        ("{}", ".json", DataFormatError, None, "not a list"),
        ('[{"id": "E1", "name": "n"}, 3]', ".json", DataFormatError, 2, "not a JSON object"),
        ("id\tnamee\n", ".tsv", DataFormatError, 1, "Did you mean 'name'"),
        ("id\tname\nE1\tn\tm\n", ".tsv", DataFormatError, 2, "not the 2 of"),
        (OK, ".txt", DataFormatError, None, "not one of .jsonl, .json, .csv, .tsv"),
    ],
)
def test_invalid_files_are_errors_that_name_the_line(read_entities, content, suffix, error, row, message):
    with pytest.raises(error, match=message) as caught:
        read_entities(content, suffix)
    assert caught.value.row == row
    assert caught.value.file is not None


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataFormatError, match="cannot be read"):
        read_entity_file(tmp_path / "typo.csv")


@pytest.mark.parametrize("content", [photo()[:900], b"<html>", huge()])
def test_invalid_images_are_errors_that_name_the_line(read_entities, tmp_path, content):
    (tmp_path / "pictures" / "bad.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"bad\.jpg") as caught:
        read_entities([{"id": "E1", "name": "n"}, {"id": "E2", "name": "n", "image": "pictures/bad.jpg"}])
    assert caught.value.row == 2


def test_bad_images_are_collected_and_their_entities_go_without_them(read_entities, tmp_path):
    (tmp_path / "pictures" / "bad.jpg").write_bytes(photo()[:900])
    rows = [
        {"id": "E1", "name": "n", "images": ["gone.jpg", "pictures/a.jpg", "pictures/bad.jpg"]},
        {"id": "E2", "name": "n", "image": "pictures/a.jpg"},
        {"id": "E3", "name": "n", "image": "pictures"},
    ]
    with pytest.raises(ImageError, match=r"entities\.jsonl, row 1: .*gone\.jpg"):
        read_entities(rows)
    path, bad_images = tmp_path / "entities.jsonl", []
    entities = read_entity_file(path, bad_images=bad_images)
    assert [len(row["images"]) for row in entities] == [1, 1, 0]
    assert [(error.file, error.row, error.message.partition(" (")[0]) for error in bad_images] == [
        (path, 1, "The image file gone.jpg does not exist."),
        (path, 1, "pictures/bad.jpg: The image is damaged"),
        (path, 3, "The image file pictures does not exist."),
    ]
    assert [str(problem) for problem in check_entity_file(path)[1]] == list(map(str, bad_images))


def test_a_file_of_entities_is_checked_row_by_row(tmp_path):
    """Errors come in the order of rows. Of two rows with the same id, the later one is an error."""
    (tmp_path / "given").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "given" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    rows = [
        {"id": "1", "name": "Ada", "image": "a.png"},
        {"id": "2"},
        {"id": "1", "name": "Ada again"},
        {"id": "3", "name": "Bo", "image": "../secret.png"},
        {"id": "4", "name": "Cy", "image": str(tmp_path / "secret.png")},
        {"id": "5", "name": "Di", "image": "b.png"},
        {"id": "6", "name": "Ed"},
    ]
    path = tmp_path / "given" / "entities.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    count, problems = check_entity_file(path, image_folder=path.parent)
    assert count == len(rows)
    assert [(type(problem), problem.row) for problem in problems] == [
        (DataFormatError, 2),
        (DuplicateIdError, 3),
        (DataFormatError, 4),
        (DataFormatError, 5),
        (ImageError, 6),
    ]
    assert "outside" in str(problems[2])
    assert "outside" in str(problems[3])
    # Without `image_folder`, images may be anywhere.
    assert [problem.row for problem in check_entity_file(path)[1]] == [2, 3, 6]


@pytest.mark.parametrize(
    ("name", "text", "count", "rows"),
    [
        ("e.jsonl", '{"id": "1", "name": "a"}\n{"id": "2", \n{"id": "3"}\n{"id": "1", "name": "a"}', 4, [2, 3, 4]),
        ("e.csv", 'id,name\n1,a\n2\n3,"x" y\n4,\n1 ,a\n', 5, [3, 4, 5, 6]),
        ("e.jsonl", "", 0, [None]),
        ("e.csv", "id,typo\n1,a\n2\n", 0, [1]),
    ],
)
def test_all_bad_rows_are_told_in_one_run(tmp_path, name, text, count, rows):
    """Rows that cannot be parsed are listed with those whose values are wrong, in the order of the file."""
    path = tmp_path / name
    path.write_text(text)
    num_rows, problems = check_entity_file(path)
    assert num_rows == count
    assert [problem.row for problem in problems] == rows
    with pytest.raises(MelError) as caught:
        read_entity_file(path)
    with pytest.raises(MelError) as caught_early:
        check_entity_rows(path)
    assert str(caught.value) == str(caught_early.value)
    if len(rows) > 1:
        assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [f"  row {row}" for row in rows]


def test_a_museums_table_is_read_by_assigned_columns(tmp_path):
    path = tmp_path / "artists.csv"
    path.write_text('no;artist;sex;placeOfBirth;url\n1 ;"Bo, Ada";female;Rome;http://example.org\n', encoding="utf-8")
    mapping = ColumnMapping(
        {"id": "no", "name": "artist", "attributes": ["sex", "placeOfBirth"]},
        ignore_others=True,
        inverted_names=True,
    )
    expected = {
        "entity_id": "1",
        "name": "Bo, Ada",
        "description": "",
        "attributes": "Sex: female. Place of birth: Rome.",
        "aliases": ["Ada Bo"],
        "images": [],
    }
    assert list(read_entity_file(path, mapping=mapping)) == [expected]
    assert check_entity_file(path, mapping=mapping) == (1, [])
    with pytest.raises(DataFormatError, match="'nmae' of --column nmae=artist is unknown"):
        read_entity_file(path, mapping=ColumnMapping({"nmae": "artist"}))
    with pytest.raises(DataFormatError, match=r"There is no column 'artists', .*Did you mean 'artist'") as caught:
        read_entity_file(path, mapping=ColumnMapping({"id": "no", "name": "artist", "aliases": "artists"}, True))
    assert caught.value.file == path


def test_rows_are_checked_without_opening_images(read_entities, tmp_path):
    (tmp_path / "pictures" / "bad.jpg").write_bytes(b"<html>")
    path = tmp_path / "entities.csv"
    path.write_text("id,name,image\n1,a,pictures/bad.jpg\n2,b,missing.jpg\n")
    check_entity_rows(path)
    assert [type(problem) for problem in check_entity_file(path)[1]] == [ImageError, ImageError]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", '{"id": 1, "name": "Ada"}\n{"id": "2"}\n'),
        (".json", '[{"id": 1, "name": "Ada"}, {"id": "2"}]'),
        (".csv", "id,name\n1,Ada\n2,\n"),
        (".tsv", "id\tname\n1\tAda\n2\t\n"),
    ],
)
def test_every_format_of_entities_is_checked(tmp_path, suffix, content):
    path = tmp_path / f"entities{suffix}"
    path.write_text(content)
    count, problems = check_entity_file(path)
    assert count == 2
    assert [problem.row for problem in problems] == [3 if suffix in (".csv", ".tsv") else 2]


def test_kept_columns_have_the_type_of_their_values(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "id,name,types,born,rating,day,note,other\n"
        "Q1,Ann,human|painter,1850,1.5,1999-12-31,7,x\n"
        "Q2,Ben,,,2,,old,x\n"
        "Q3,Cleo,human,-44,,2000-01-01,,x\n",
        encoding="utf-8",
    )
    kept = ("types", "born", "rating", "day", "note")
    rows = read_entity_file(path, mapping=ColumnMapping(kept=kept, ignore_others=True))
    assert rows.column_names == [*entity_features(), *kept]
    assert rows["types"][:] == [["human", "painter"], [], ["human"]]
    assert rows["born"][:] == [1850, None, -44]
    assert rows["rating"][:] == [1.5, 2.0, None]
    assert rows["day"][:] == [datetime.date(1999, 12, 31), None, datetime.date(2000, 1, 1)]
    assert rows["note"][:] == ["7", "old", None]


def test_a_column_can_be_joined_and_kept(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("id,name,gender,born\nQ1,Ann,Female,1850\n", encoding="utf-8")
    mapping = ColumnMapping({"attributes": ["gender", "born"]}, kept=("born", "gender"))
    row = read_entity_file(path, mapping=mapping)[0]
    assert (row["attributes"], row["born"], row["gender"]) == ("Gender: Female. Born: 1850.", 1850, "Female")


def test_kept_columns_of_json_and_those_that_are_not_there(read_entities, tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"id": "Q1", "name": "Ann", "types": ["human"], "alive": True, "born": 1850, "mixed": 1},
        {"id": "Q2", "name": "Ben", "alive": False, "mixed": "one"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = read_entity_file(path, mapping=ColumnMapping(kept=("types", "alive", "born", "mixed")))
    assert (rows["types"][:], rows["alive"][:]) == ([["human"], []], [True, False])
    assert (rows["born"][:], rows["mixed"][:]) == ([1850, None], ["1", "one"])
    with pytest.raises(DataFormatError, match=r"no column 'birn'.*born"):
        read_entity_file(path, mapping=ColumnMapping(kept=("birn",), ignore_others=True))
    with pytest.raises(DataFormatError, match="'name' is kept anyway"):
        read_entity_file(path, mapping=ColumnMapping(kept=("name",)))
    path.write_text(json.dumps({"id": "Q1", "name": "Ann", "born": {"year": 1850}}), encoding="utf-8")
    with pytest.raises(DataFormatError, match="'born' is"):
        read_entity_file(path, mapping=ColumnMapping(kept=("born",)))
