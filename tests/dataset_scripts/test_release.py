"""Reading releases: files, ids, images and spans."""

from __future__ import annotations

import json

import pytest

from hf_mel.dataset_scripts.image_files import images_by_id, read_image
from hf_mel.dataset_scripts.release import Release, ReleaseLog
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import NIL
from tests.dataset_scripts.fixtures import write_entity_images


@pytest.fixture
def release(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    return Release(tmp_path, {"one": ["a.json"]})


@pytest.mark.parametrize(
    ("content", "error", "row", "message"),
    [
        (b'{"a": NaN}', DataFormatError, None, "NaN is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", DataFormatError, None, "is not JSON"),
        (b'{"a": ' + b"[" * 100_000, DataFormatError, None, "is not JSON"),
        (b'{"a": 1, "b": ["\\ud800"]}', DataFormatError, "b", "unpaired surrogate"),
        (b'{"\\ud800": 1}', DataFormatError, "\\ud800", "unpaired surrogate"),
        (b'{"\\udfff": 1, "\\udfff": 1}', DuplicateIdError, "\\udfff", "occurs twice"),
        (b'{"a": "\xff"}', DataFormatError, None, "UTF-8"),
        (b"[]", DataFormatError, None, "expected a dict"),
        (b"", DataFormatError, None, "is not JSON"),
    ],
)
def test_json_that_no_file_can_hold_on(release, content, error, row, message):
    (release.root / "a.json").write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        release.read_json("a.json", dict)
    assert (caught.value.file, caught.value.row) == (release.root / "a.json", row)
    str(caught.value).encode()


def test_json_with_what_files_do_have(release):
    content = {"smile": "😴", "escaped": "\\ud800 as text", "line": "\u2028"}
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False)):
        (release.root / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
        assert release.read_json("a.json", dict) == content


def test_a_file_that_is_a_folder_is_a_typed_error(release):
    (release.root / "folder").mkdir()
    with pytest.raises(DataFormatError, match="cannot be read"):
        release.read_json("folder", dict)


@pytest.mark.parametrize("value", [None, "", " ", "nil", "NIL", "Nil ", "null", "None", "[NIL]", "--NME--"])
def test_nil_in_every_spelling(release, value):
    assert release.gold("a.json", 0, value) == NIL


@pytest.mark.parametrize(("value", "expected"), [(5, "5"), (" Q5\r", "Q5"), ("0", "0")])
def test_ids_as_texts_and_numbers(release, value, expected):
    assert release.gold("a.json", 0, value) == release.identifier("a.json", 0, value) == expected


@pytest.mark.parametrize("value", [True, 1.5, [], {}, ["Q1"]])
def test_what_is_no_id(release, value):
    with pytest.raises(DataFormatError, match="for an id"):
        release.gold("a.json", 7, value)


def test_images_of_entities_under_every_name(tmp_path):
    contents = write_entity_images(tmp_path)
    actual = images_by_id(tmp_path)
    assert {
        qid: [image["bytes"] for name in names if (image := read_image(tmp_path, name))]
        for qid, names in actual.items()
    } == contents
    assert images_by_id(None) == {}


def test_an_image_by_its_path_or_its_last_part(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(b"below")
    (tmp_path / "x.jpg").write_bytes(b"here")
    (tmp_path.parent / "outside.jpg").write_bytes(b"secret")
    assert read_image(tmp_path, "a/x.jpg") == {"bytes": b"below", "path": None}
    assert read_image(tmp_path, "b/x.jpg") == {"bytes": b"here", "path": None}
    for name in ("../outside.jpg", str(tmp_path.parent / "outside.jpg"), "a", "", "x" * 5000, "a\0b", "\ud800.jpg"):
        assert read_image(tmp_path, name) is None


def test_spans_that_are_given_are_taken():
    assert locate("Bo, Bo and Bo", ["Bo", "Bo", "Bo"], [(4, 6)]) == [(0, 2), (11, 13), (-1, -1)]


def test_a_log_lists_every_case():
    log = ReleaseLog()
    log.problem("kind", "file", 3, "detail")
    log.problem("kind", "file", "row")
    assert log.problems == {"kind": [("file", "3", "detail"), ("file", "row", "")]}
    assert ReleaseLog().problems == {}
    other = ReleaseLog()
    other.sha256["file"] = "0"
    other.merge(log)
    assert (other.sha256, other.problems) == ({"file": "0"}, log.problems)
