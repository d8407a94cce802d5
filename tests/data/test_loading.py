"""Tests of loading mentions, entities and posts, and of files of entities."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from PIL import Image

from hf_mel.building.build import build_dataset
from hf_mel.data.loading import (
    check_entity_file,
    check_golds,
    dataset_version,
    load_entities,
    load_mentions,
    load_posts,
    read_entity_file,
)
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    UnknownDatasetError,
    UnknownEntityError,
    UnknownSplitError,
)
from hf_mel.schema import NIL, entity_features
from tests.data.test_images import huge, photo
from tests.dataset_scripts.fixtures import NAMES, picture, write_melbench
from tests.toy import toy_entities, toy_mentions, write_toy_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    build_dataset("wikimel", output=root / "wikimel", raw_dir=write_melbench(root / "raw"), allow_count_mismatch=True)
    return root / "wikimel"


def test_mentions_and_entities_load(folder):
    mentions = load_mentions(folder, "validation")
    assert [row["mention"] for row in mentions] == ["José Brun", "Brun"]
    assert mentions[0]["image"].size == (24, 16)
    assert load_mentions(str(folder), "test")["mention_id"] == ["105-0", "105-1"]
    entities = load_entities(folder)
    assert dict(zip(entities["entity_id"], entities["name"], strict=True)) == NAMES


def test_an_unknown_split_or_configuration_is_an_error(folder):
    with pytest.raises(UnknownSplitError, match=r"no split 'dev'; it has 'train', 'validation', 'test'"):
        load_mentions(folder, "dev")
    with pytest.raises(UnknownSplitError, match=r"no configuration 'posts'; it has .*'mentions'"):
        load_posts(folder)


def test_an_unknown_data_set_is_an_error(tmp_path, folder):
    for name in (tmp_path / "typo", "no spaces allowed"):
        with pytest.raises(UnknownDatasetError, match="neither a folder"):
            load_mentions(name, "test")
    with pytest.raises(UnknownDatasetError, match="neither a folder"):  # cannot be reached offline
        load_mentions("nobody/has-this", "test")
    with pytest.raises(UnknownDatasetError, match="holds no data set"):
        load_mentions(tmp_path, "test")
    with pytest.raises(UnknownDatasetError, match="no revision"):
        load_mentions(folder, "test", revision="v2")
    with pytest.raises(UnknownDatasetError, match="is a file"):
        load_entities(folder / "README.md")


def test_a_damaged_parquet_file_is_an_error(folder, tmp_path):
    copy = tmp_path / "copy"
    (copy / "entities").mkdir(parents=True)
    (copy / "README.md").write_bytes((folder / "README.md").read_bytes())
    name = "entities/kb-00000-of-00001.parquet"
    (copy / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(DataFormatError, match="cannot be read"):
        load_entities(copy)


def test_missing_columns_are_an_error(tmp_path):
    datasets.Dataset.from_dict({"entity_id": ["E"], "name": ["n"]}).to_parquet(tmp_path / "entities" / "kb.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: entities\n  data_files:\n  - split: kb\n    path: entities/kb*\n---\n"
    )
    with pytest.raises(DataFormatError, match=r"lacks the columns \['description', 'attributes'"):
        load_entities(tmp_path)


def test_a_folder_and_its_copy_on_the_hub_have_the_same_version(folder, monkeypatch):
    version = dataset_version(folder)
    parquet = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    lines = sorted(f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in parquet.items())
    assert version == {
        "dataset": "wikimel",
        "revision": None,
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }
    siblings = [
        SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()))
        for name, content in reversed(parquet.items())
    ]
    siblings.append(SimpleNamespace(rfilename="README.md", lfs=None))
    info = SimpleNamespace(sha="c0ffee", siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    assert dataset_version("org/wikimel") == {**version, "dataset": "org/wikimel", "revision": "c0ffee"}
    siblings[0].lfs = None
    assert dataset_version("org/wikimel")["sha256"] is None


def test_the_version_needs_the_hub_or_parquet_files(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert dataset_version("org/name", revision="v1") == {"dataset": "org/name", "revision": "v1", "sha256": None}
    with pytest.raises(UnknownDatasetError):
        dataset_version(tmp_path)


def test_one_changed_byte_changes_the_version(folder, tmp_path):
    before = dataset_version(folder)["sha256"]
    for path in folder.rglob("*.parquet"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert dataset_version(tmp_path)["sha256"] == before
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert dataset_version(tmp_path)["sha256"] != before


def test_unknown_golds_and_repeated_ids_are_errors(folder):
    mentions, ids = load_mentions(folder, "train"), load_entities(folder)["entity_id"]
    check_golds(mentions, ids)
    check_golds([{"mention_id": "1", "entity_id": NIL}], [])
    with pytest.raises(UnknownEntityError, match="gold 'Q901' of mention '101'") as caught:
        check_golds(mentions, [i for i in ids if i != "Q901"], file="f")
    assert (caught.value.file, caught.value.row) == ("f", 1)
    with pytest.raises(DuplicateIdError, match="that of row 0") as caught:
        check_golds([*mentions, mentions[0]], ids)
    assert caught.value.row == 5
    with pytest.raises(DuplicateIdError, match="entity id 'Q901'"):
        check_golds(mentions, [*ids, "Q901"])


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
        ("id,name\nE1,n\nE2,n,more\n", ".csv", DataFormatError, 3, "2 fields"),
        ("id,name\nE1,n\nE2\n", ".csv", DataFormatError, 3, "2 fields"),
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
        ("id\tname\nE1\tn\tm\n", ".tsv", DataFormatError, 2, "2 fields"),
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
        (ImageError, 4),
        (ImageError, 5),
        (ImageError, 6),
    ]
    assert "outside" in str(problems[2])
    assert "outside" in str(problems[3])
    # Without `image_folder`, images may be anywhere.
    assert [problem.row for problem in check_entity_file(path)[1]] == [2, 3, 6]


@pytest.mark.parametrize(("text", "row"), [('{"id": "1", "name": "a"}\n{"id": "2", ', 2), ("", None)])
def test_checking_stops_at_a_row_that_cannot_be_parsed(tmp_path, text, row):
    path = tmp_path / "entities.jsonl"
    path.write_text(text)
    _, problems = check_entity_file(path)
    assert [problem.row for problem in problems] == [row]


def test_a_folder_of_the_same_name_or_built_again_does_not_load_cached_rows(tmp_path):
    """`datasets` identifies a folder by its name and card, and would return the rows cached for the first one."""
    golds = []
    for period, place in ((0, "a"), (6, "b"), (4, "b")):
        write_toy_dataset(tmp_path / place / "data", toy_entities(), train=toy_mentions(20, nil_every=period))
        golds.append(list(load_mentions(tmp_path / place / "data", "train")["entity_id"]).count(NIL))
    assert golds == [0, 20 // 6, 20 // 4]


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
