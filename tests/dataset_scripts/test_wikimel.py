from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.spans import locate
from hf_mel.dataset_scripts.wikimel.wikimel import WikiMel
from hf_mel.errors import DataFormatError, DuplicateIdError, UnknownEntityError
from hf_mel.schema import NIL, entity_features, mention_features
from tests.dataset_scripts.fixtures import (
    NAMES,
    melbench_samples,
    write_cleaned,
    write_json,
    write_kgmel,
    write_melbench,
)


def rows_of(raw, config, tmp_path, **options):
    """Split → rows, as `datasets` gets them from the builder."""
    builder = WikiMel(config_name=config, data_dir=str(raw), cache_dir=str(tmp_path / "cache"), **options)
    rows = {
        str(split.name): [row for _, row in builder._generate_examples(**split.gen_kwargs)]
        for split in builder._split_generators(None)
    }
    return rows, builder


@pytest.fixture
def raw(tmp_path):
    return write_melbench(tmp_path / "raw")


@pytest.fixture
def cleaned(tmp_path):
    return write_cleaned(tmp_path / "raw", "WIKIMEL")


def short(row):
    return (row["mention_id"], row["context_id"], row["mention"], row["start"], row["end"], row["entity_id"])


def test_melbench_mentions_by_hand(raw, tmp_path):
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        # The order is that of splits.json; "Falk" is taken in turn, the first two stand at 0 and 9.
        "train": [
            ("103", "103", "Berta Holm", -1, -1, "Q903"),
            ("101", "101", "Ada Falk", 0, 8, "Q901"),
            ("102-0", "102", "Bo Falk", 17, 24, "Q902"),
            ("102-1", "102", "Falk", 0, 4, "Q901"),
            ("102-2", "102", "Falk", 9, 13, "Q902"),
        ],
        # "Brun" stands inside "José Brun" only, which is still a place of its own.
        "validation": [("104-0", "104", "José Brun", 4, 13, "Q904"), ("104-1", "104", "Brun", 9, 13, "Q904")],
        # Two mentions, one place.
        "test": [("105-0", "105", "Falk", 4, 8, "Q901"), ("105-1", "105", "Falk", -1, -1, "Q902")],
    }
    for part in rows.values():
        for row in part:
            path = raw / "mention_images" / f"{row['context_id']}.jpg"
            assert row["image"] == ({"bytes": path.read_bytes(), "path": None} if path.is_file() else None)
            assert row["text"] == melbench_samples()[row["context_id"]]["sentence"]
            assert set(row) == set(mention_features())
    assert builder.release.layout == "melbench"
    assert builder.release.problems == {
        "missing_mention_image": [("Wikidata-MEL.json", "103", "103.jpg")],
        "split_id_without_sentence": [("splits.json", "199", "train")],
    }
    assert set(builder.release.sha256) == {"Wikidata-MEL.json", "splits.json"}


def test_melbench_entities(raw, tmp_path):
    (raw / "pictures").mkdir()
    (raw / "pictures" / "Q902.png").write_bytes(b"anything")
    rows, builder = rows_of(raw, "entities", tmp_path, entity_images=str(raw / "pictures"))
    assert list(rows) == ["kb"]
    assert [(row["entity_id"], row["name"]) for row in rows["kb"]] == list(NAMES.items())
    assert [row["attributes"] for row in rows["kb"]] == list(json.loads((raw / "qid2abs.json").read_text()).values())
    assert [row["images"] for row in rows["kb"]] == [[], [{"bytes": b"anything", "path": None}], [], []]
    assert all(set(row) == set(entity_features()) for row in rows["kb"])
    assert builder.release.problems["entity_without_attributes"] == [("qid2abs.json", "Q904", "")]
    assert [row for _, row, _ in builder.release.problems["missing_entity_image"]] == ["Q901", "Q903", "Q904"]


def test_no_images_folder_lists_every_context_once(raw, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    rows, builder = rows_of(raw, "mentions", tmp_path, images=str(empty))
    assert all(row["image"] is None for part in rows.values() for row in part)
    missing = [row for _, row, _ in builder.release.problems["missing_mention_image"]]
    assert sorted(missing) == sorted(melbench_samples())


def test_works_as_a_plain_datasets_builder(raw, tmp_path):
    builder = WikiMel(data_dir=str(raw), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    data = builder.as_dataset()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 5, "validation": 2, "test": 2}
    assert data["train"].features == mention_features()
    assert data["train"][0]["image"] is None
    assert data["train"][1]["image"].size == (24, 16)


def test_sentence_in_no_split_is_listed(raw, tmp_path):
    write_json(raw / "splits.json", {"train": ["101"], "test": ["105"], "dev": ["104"]})
    _, builder = rows_of(raw, "mentions", tmp_path)
    assert [row for _, row, _ in builder.release.problems["sentence_without_split"]] == ["102", "103"]


def test_cleaned_mentions_by_hand(cleaned, tmp_path):
    rows, builder = rows_of(cleaned, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        "train": [
            ("train-0", "train-0", "Ada", 9, 12, "Q901"),
            ("train-1", "train-1", "José Brun", -1, -1, "Q904"),
            ("train-2", "train-0", "Brun", 0, 4, "Q904"),
        ],
        "validation": [("dev-0", "dev-0", "Holm", 13, 17, NIL)],
        "test": [("test-0", "test-0", "Berta", 0, 5, "Q903")],
    }
    # "12.v2.png" is stored under its name up to the first dot.
    stored = {"bytes": (cleaned / "mention_image" / "12.jpg").read_bytes(), "path": None}
    assert [row["image"] for row in rows["train"]] == [stored, None, stored]
    assert builder.release.layout == "mimic"
    assert builder.release.problems == {"missing_mention_image": [("WIKIMEL_dev.json", "0", "77.jpg")]}


def test_cleaned_entities_by_hand(cleaned, tmp_path):
    rows, builder = rows_of(cleaned, "entities", tmp_path)
    actual = [(row["entity_id"], row["name"], row["attributes"]) for row in rows["kb"]]
    assert actual == [
        ("Q901", "Ada Falk", "Sex: female. Occupation: sailor."),
        ("Q904", "José Brun", ""),
        ("Q903", "Berta von Holm", "Occupation: poet."),
    ]
    names = ["Q901_0.PNG", "Q901_1.jpg"]
    assert [image["bytes"] for image in rows["kb"][0]["images"]] == [
        (cleaned / "kb_image" / name).read_bytes() for name in names
    ]
    assert builder.release.problems == {"missing_entity_image": [("kb_entity.json", "2", "gone.jpg")]}


def test_two_qids_of_one_entity_lead_to_the_same_gold(cleaned, tmp_path):
    (cleaned / "qid2id.json").write_text('{"Q901": 0, "Q904": 1, "Q903": 2, "Q77": 0}')
    samples = json.loads((cleaned / "WIKIMEL_test.json").read_text())
    write_json(cleaned / "WIKIMEL_test.json", [{**samples[0], "answer": "Q77"}])
    rows, _ = rows_of(cleaned, "mentions", tmp_path)
    assert rows["test"][0]["entity_id"] == "Q901"


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("Wikidata-MEL.json", b'{"101": {"id": "101", ', DataFormatError, "is not JSON"),
        ("Wikidata-MEL.json", b"\xff\xfe\x00", DataFormatError, "UTF-8"),
        ("Wikidata-MEL.json", b"[]", DataFormatError, "holds a list, expected a dict"),
        ("Wikidata-MEL.json", b'{"101": {}, "101": {}}', DuplicateIdError, "'101' occurs twice"),
        ("Wikidata-MEL.json", b'{"101": {"id": "101", "sentence": "x"}}', DataFormatError, "no key 'mentions'"),
        ("Wikidata-MEL.json", b'{"101": 3}', DataFormatError, "expected an object"),
        (
            "Wikidata-MEL.json",
            b'{"101": {"id": "101", "sentence": "x", "mentions": ["x"], "answer": []}}',
            DataFormatError,
            "1 mentions and 0 answers",
        ),
        (
            "Wikidata-MEL.json",
            b'{"101": {"id": "101", "sentence": "x", "mentions": [5], "answer": ["Q901"]}}',
            DataFormatError,
            "not a string",
        ),
        (
            "Wikidata-MEL.json",
            b'{"101": {"id": "7", "sentence": "x", "mentions": [], "answer": []}}',
            DataFormatError,
            "has id '7'",
        ),
        ("splits.json", b'{"train": ["101"], "dev": ["101"], "test": []}', DuplicateIdError, "dev and in train"),
        ("splits.json", b'{"train": ["101"], "dev": []}', DataFormatError, "no key 'test'"),
    ],
)
def test_bad_mention_files(raw, tmp_path, file, content, error, message):
    (raw / file).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        rows_of(raw, "mentions", tmp_path)
    assert caught.value.file == raw / file


def test_a_name_that_is_not_a_text(raw, tmp_path):
    write_json(raw / "qid2ne.json", {"Q901": None})
    with pytest.raises(DataFormatError, match="expected a string") as caught:
        rows_of(raw, "entities", tmp_path)
    assert caught.value.row == "Q901"


def test_cleaned_kb_out_of_step(cleaned, tmp_path):
    entities = json.loads((cleaned / "kb_entity.json").read_text())
    write_json(cleaned / "kb_entity.json", entities[::-1])
    with pytest.raises(DataFormatError, match="has id 2, expected 0"):
        rows_of(cleaned, "entities", tmp_path)
    write_json(cleaned / "kb_entity.json", entities[:2])
    with pytest.raises(UnknownEntityError, match=r"points at row 2, but kb_entity\.json has 2 rows"):
        rows_of(cleaned, "entities", tmp_path)


def test_neither_layout_lists_every_file(raw, tmp_path):
    (raw / "splits.json").unlink()
    with pytest.raises(DataFormatError) as caught:
        rows_of(raw, "mentions", tmp_path)
    message = str(caught.value)
    assert "splits.json (missing)" in message
    assert "qid2ne.json (found)" in message
    assert "WIKIMEL_dev.json (missing)" in message
    assert "kb_entity.json (missing)" in message


@pytest.mark.parametrize("option", ["data_dir", "images"])
def test_a_folder_that_is_not_there(raw, tmp_path, option):
    with pytest.raises(DataFormatError, match="is not a folder"):
        rows_of(
            tmp_path / "typo" if option == "data_dir" else raw, "mentions", tmp_path, images=str(tmp_path / "typo")
        )


def test_image_names_cannot_leave_their_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    assert read_image(tmp_path / "images", "../secret.jpg") is None


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", max_size=3), max_size=5))
def test_locate_laws(text, mentions):
    spans = locate(text, mentions)
    assert len(spans) == len(mentions)
    actual = [span for span in spans if span != (-1, -1)]
    assert len(set(actual)) == len(actual)
    for k, (mention, (start, end)) in enumerate(zip(mentions, spans, strict=True)):
        places = {i for i in range(len(text)) if mention and text.startswith(mention, i)}
        if start >= 0:
            assert text[start:end] == mention
        else:  # every place of it belongs to an earlier mention
            assert places == {s for s, e in spans[:k] if s >= 0 and text[s:e] == mention}
    if mentions and mentions[0] and mentions[0] in text:
        assert spans[0][0] == text.index(mentions[0])


def test_locate_prefers_a_free_place_to_one_inside_another_mention():
    assert locate("Jo Berg and Berg", ["Jo Berg", "Berg"]) == [(0, 7), (12, 16)]
    assert locate("Jo Berg and", ["Jo Berg", "Berg"]) == [(0, 7), (3, 7)]


def test_kgmel_by_hand(tmp_path):
    raw = write_kgmel(tmp_path / "raw", "WikiMEL")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        # In the order of the list of ids, which are numbers there and texts elsewhere.
        "train": [("1", "1", "Holm", 0, 4, "Q903"), ("0-0", "0", "Ada", 9, 12, "Q901"), ("0-1", "0", "Brun", 0, 4, "Q904")],
        "validation": [("2", "2", "Holm", 13, 17, NIL)],
        "test": [("3-0", "3", "Ada", 0, 3, "Q901"), ("3-1", "3", "José Brun", 8, 17, "Q904")],
    }  # fmt: skip
    green = {"bytes": (raw / "data/dataset/image/WikiMEL/mention_0.jpg").read_bytes(), "path": None}
    # The picture of sample 2 is blank, and listed as such.
    assert [row["image"] for part in rows.values() for row in part] == [None, green, green, None, None, None]
    assert builder.release.layout == "kgmel"
    name = "data/dataset/WikiMEL.json"
    assert builder.release.problems == {
        "missing_mention_image": [(name, "1", "mention_1.jpg")],
        "split_id_without_sentence": [("data/dataset/mapping/ids_split_mappings.json", "77", "train")],
    }

    rows, builder = rows_of(raw, "entities", tmp_path)
    actual = [(row["entity_id"], row["name"], row["description"], len(row["images"])) for row in rows["kb"]]
    assert actual == [
        ("Q901", "Ada Falk", "a sailor", 1),
        ("Q903", "Berta von Holm", "", 0),  # not among the labels: the title that its mention has
        ("Q904", "José Brun", "", 0),
    ]
    assert set(builder.release.problems) == {"knowledge_base_of_golds_only", "missing_entity_image"}


def test_kgmel_takes_the_published_list_of_candidates_and_its_inner_folder(tmp_path):
    raw = write_kgmel(tmp_path / "raw", "WikiMEL") / "data/dataset"
    write_json(raw / "mapping/qids_candidate.json", {"WikiMEL": ["Q904", "Q77", "Q901"]})
    rows, builder = rows_of(raw, "entities", tmp_path)
    assert [row["name"] for row in rows["kb"]] == ["José Brun", "Nobody", "Ada Falk"]
    assert "knowledge_base_of_golds_only" not in builder.release.problems
    rows, _ = rows_of(raw, "mentions", tmp_path)
    assert len(rows["train"]) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mention": ["Ada"]}, DataFormatError, "1, 2, 2 mentions"),
        ({"mention": ["Ada", None]}, DataFormatError, "not a string"),
        ({"id": None}, DataFormatError, "for an id"),
        ({"id": 1}, DuplicateIdError, "'1' occurs twice"),
        ({"answer": ["Q901", []]}, DataFormatError, "for an id"),
    ],
)
def test_bad_samples_of_kgmel(tmp_path, change, error, message):
    raw = write_kgmel(tmp_path / "raw", "WikiMEL")
    file = raw / "data/dataset/WikiMEL.json"
    samples = json.loads(file.read_text())
    write_json(file, [{**samples[0], **change}, *samples[1:]])
    with pytest.raises(error, match=message) as caught:
        rows_of(raw, "mentions", tmp_path)
    assert caught.value.file == file
    assert caught.value.row is not None


def test_cleaned_entities_with_m3els_descriptions(cleaned, tmp_path):
    entities = json.loads((cleaned / "kb_entity.json").read_text())
    changed = [{**entity, "id": str(entity["id"]), "desc": f"No. {k}"} for k, entity in enumerate(entities)]
    del changed[0]["attr"]
    changed[1]["attr"] = None
    write_json(cleaned / "kb_entity.json", changed)
    rows, _ = rows_of(cleaned, "entities", tmp_path)
    assert [(row["description"], row["attributes"]) for row in rows["kb"]] == [
        ("No. 0", ""),
        ("No. 1", ""),
        ("No. 2", "Occupation: poet."),
    ]
    del changed[0]["desc"]
    write_json(cleaned / "kb_entity.json", changed)
    with pytest.raises(DataFormatError, match="no key 'attr'"):
        rows_of(cleaned, "entities", tmp_path)


def test_ids_and_golds_as_numbers_and_nil(raw, tmp_path):
    samples = melbench_samples()
    samples["101"].update(id=101, answer=["nil"])
    write_json(raw / "Wikidata-MEL.json", samples)
    write_json(raw / "splits.json", {"train": [101, 103], "test": ["105"], "dev": [104]})
    rows, _ = rows_of(raw, "mentions", tmp_path)
    assert short(rows["train"][0]) == ("101", "101", "Ada Falk", 0, 8, NIL)
