"""Tests of columns with other names: mapping, joining, leaving out, and the errors of unknown ones."""

from __future__ import annotations

import logging
import shlex

import pytest

from hf_mel.errors import DataFormatError
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import ENTITY_COLUMNS, read_rows

MUSEUM = (
    "no,Artist,gender,placeOfBirth,year_of_birth,ULAN,known as,notes\n"
    '7,"Bo, Ada",female,Rome.,1930,500,A|B,x\n8,Cy,,,,501,,\n'
)


def read(folder, content, assignments=(), columns=ENTITY_COLUMNS, name="rows.csv", keep_others=False, **options):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    mapping = ColumnMapping.parse(assignments, **options)
    rows = [row for _, row in read_rows(path, columns, mapping=mapping, keep_others=keep_others)]
    mapping.check_used(path)
    return rows


def test_a_table_of_a_museum_is_read_by_its_own_columns(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_mel")
    assignments = ["id=no", "name=Artist", "attributes=gender,placeOfBirth,year_of_birth,ULAN", "aliases=known as"]
    assert read(tmp_path, MUSEUM, assignments, ignore_others=True) == [
        {
            "id": "7",
            "name": "Bo, Ada",
            "attributes": "Gender: female. Place of birth: Rome. Year of birth: 1930. ULAN: 500.",
            "aliases": "A|B",
        },
        {"id": "8", "name": "Cy", "attributes": "ULAN: 501.", "aliases": ""},
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'rows.csv'}: these columns are left out: notes."
    ]


def test_columns_are_joined_as_their_target_needs(tmp_path):
    content = "id,forename,surname,a,b,x,y\n1,Ada,Bo,A|B,C,p.png,q.png\n2,,Cy,,,,\n"
    assignments = ["name=forename,surname", "aliases=a,b", "image=x,y"]
    assert read(tmp_path, content, assignments) == [
        {"id": "1", "name": "Ada Bo", "aliases": ["A", "B", "C"], "image": ["p.png", "q.png"]},
        {"id": "2", "name": "Cy", "aliases": ["", ""], "image": ["", ""]},
    ]


def test_json_values_are_joined(tmp_path):
    content = (
        '{"id": 1, "name": "n", "year": 1930, "jobs": ["a", "b"], "place": null}\n{"id": 2, "name": "m", "jobs": []}'
    )
    rows = read(tmp_path, content, ["attributes=year,jobs,place"], name="rows.jsonl")
    assert [row["attributes"] for row in rows] == ["Year: 1930. Jobs: a, b.", ""]
    with pytest.raises(DataFormatError, match="cell 'jobs' is") as caught:
        read(tmp_path, content + '\n{"id": 3, "jobs": {"a": 1}}', ["attributes=year,jobs,place"], name="rows.jsonl")
    assert caught.value.row == 3


def test_a_column_can_be_left_out_or_replaced(tmp_path):
    """An assigned column comes before one of that name, and "image=" reads no image."""
    content = "id,name,label,image\n1,x,Ada,http://example.org/a.png\n"
    assert read(tmp_path, content, ["name=label", "image="], ignore_others=True) == [{"id": "1", "name": "Ada"}]
    assert read(tmp_path, content, ["name=label", "image="]) == [{"id": "1", "name": "Ada"}]


def test_a_column_can_be_read_twice(tmp_path):
    assert read(tmp_path, "id\nAda\n", ["name=id", "id=id"]) == [{"name": "Ada", "id": "Ada"}]


def test_names_may_differ_in_case(tmp_path):
    assert read(tmp_path, "ID,Name,DATES\n1,Ada,1930\n", ["description=dates"]) == [
        {"id": "1", "name": "Ada", "description": "1930"}
    ]
    assert read(tmp_path, '{"Id": 1, "NAME": "Ada"}', name="rows.jsonl") == [{"id": 1, "name": "Ada"}]
    with pytest.raises(DataFormatError, match="'id' twice"):
        read(tmp_path, "Id,id,name\n1,2,Ada\n")
    # Of two columns that differ in case, an assignment takes the one that is written like it.
    assert read(tmp_path, "Id,ID,name\n1,2,Ada\n", ["id=ID"], ignore_others=True)[0]["id"] == "2"


def test_other_columns_can_be_kept(tmp_path):
    rows = read(tmp_path, "Text,Note\nx,y\n", columns={"text": "text"}, keep_others=True)
    assert rows == [{"text": "x", "Note": "y"}]
    rows = read(tmp_path, "sentence,Note\nx,y\n", ["text=sentence"], columns={"text": "text"}, keep_others=True)
    assert rows == [{"text": "x", "Note": "y"}]
    assert read(tmp_path, "sentence,Note\nx,y\n", ["text=sentence"], columns=None) == [{"text": "x", "Note": "y"}]


def test_a_name_with_a_comma_is_quoted(tmp_path):
    content = 'id,name,"birth, place",sex\n1,Ada,Rome,f\n'
    rows = read(tmp_path, content, ['attributes="birth, place",sex'])
    assert rows[0]["attributes"] == "Birth, place: Rome. Sex: f."
    with pytest.raises(DataFormatError, match="unknown") as caught:
        read(tmp_path, 'id,"artist, name"\n1,Ada\n')
    options = shlex.split(caught.value.remedy.partition("or add: ")[2])
    assert read(tmp_path, 'id,"artist, name"\n1,Ada\n', options[1::2]) == [{"id": "1", "name": "Ada"}]


@pytest.mark.parametrize(
    ("header", "unknown", "options"),
    [
        ("id,nmae,url", ["nmae", "url"], ["--column", "name=nmae", "--ignore-other-columns"]),
        ("artist_id,artistName,Description", ["artist_id", "artistName"], ["id=artist_id", "name=artistName"]),
        ("id,name,descripton", ["descripton"], ["description=descripton"]),
        ("id,name,height", ["height"], ["--ignore-other-columns"]),
        (
            "item,itemLabel,itemDescription,itemAltLabel,image,coord",
            ["item", "itemLabel", "itemDescription", "itemAltLabel", "coord"],
            [
                *("id=item", "name=itemLabel", "description=itemDescription", "aliases=itemAltLabel", "image="),
                "--ignore-other-columns",
            ],
        ),
        ("country,countryLabel", ["country", "countryLabel"], ["id=country", "name=countryLabel"]),
    ],
)
def test_all_unknown_columns_are_told_with_the_options_that_read_them(tmp_path, header, unknown, options):
    """The options of the error, pasted, read the file."""
    content = f"{header}\n{','.join('x' for _ in header.split(','))}\n"
    with pytest.raises(DataFormatError, match="unknown") as caught:
        read(tmp_path, content)
    error = caught.value
    assert (error.file, error.row) == (tmp_path / "rows.csv", 1)
    assert all(repr(name) in error.message for name in unknown)
    given = shlex.split(error.remedy.partition("or add: ")[2])
    assert [option for option in given if option != "--column"] == [o for o in options if o != "--column"]
    assert ("Wikidata Query Service" in error.remedy) == ("Label" in header)
    assignments = [option for option in given if not option.startswith("--")]
    assert len(read(tmp_path, content, assignments, ignore_others="--ignore-other-columns" in given)) == 1


def test_unknown_columns_of_all_json_rows_are_told(tmp_path):
    content = '{"id": 1, "name": "a"}\n{"id": 2, "nmae": "b"}\n{"id": 3, "NAME": "c", "url": ""}\n'
    with pytest.raises(DataFormatError, match=r"columns 'nmae', 'url' are unknown; .*Did you mean 'name'") as caught:
        read(tmp_path, content, name="rows.jsonl")
    assert caught.value.row == 2


def test_a_table_without_a_required_column_is_one_error(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,artist_name\n1,Ada\n2,Bo\n")
    mapping = ColumnMapping(ignore_others=True)
    bad_rows = []
    with pytest.raises(DataFormatError, match=r"no column 'name'; the columns are id, artist_name") as caught:
        list(read_rows(path, ENTITY_COLUMNS, mapping=mapping, required=("id", "name"), bad_rows=bad_rows))
    assert "--column name=artist_name" in caught.value.remedy
    assert bad_rows == []


def test_wrong_assignments_are_errors(tmp_path):
    for assignment in ("name", "=x", "  "):
        with pytest.raises(DataFormatError, match="does not assign a column"):
            ColumnMapping.parse([assignment])
    with pytest.raises(DataFormatError, match=r"'name' is assigned twice.*--column name=FIRST,SECOND"):
        ColumnMapping.parse(["name=a", "name=b"])
    with pytest.raises(DataFormatError, match=r"'nmae' of --column nmae=artist is unknown\. Did you mean 'name'"):
        ColumnMapping.parse(["nmae=artist"]).check_targets(ENTITY_COLUMNS)
    with pytest.raises(DataFormatError, match=r"no column 'dats', which --column description=dats.*mean 'dates'"):
        read(tmp_path, "id,name,dates\n1,Ada,1930\n", ["description=dats"], ignore_others=True)
    with pytest.raises(DataFormatError, match="'entity_id' twice"):
        read(tmp_path, "a,b,name\n1,2,Ada\n", ["id=a", "entity_id=b"])
