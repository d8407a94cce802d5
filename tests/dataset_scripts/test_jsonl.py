from __future__ import annotations

import hashlib
import json
import unicodedata
from itertools import permutations

import pytest
from datasets import load_dataset

from hf_mel.building.build import build_dataset
from hf_mel.dataset_scripts.jsonl.jsonl import Jsonl, hashed_split
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    SpanError,
    UnknownEntityError,
)
from hf_mel.schema import NIL, entity_features, mention_features, post_features
from tests.dataset_scripts import jsonl_release
from tests.dataset_scripts.fixtures import picture


@pytest.fixture
def raw(tmp_path):
    jsonl_release.write(tmp_path / "raw")
    return tmp_path / "raw"


def rows_of(config, **options):
    """Split → rows, as `datasets` gets them from the builder."""
    builder = Jsonl(config_name=config, **{key: str(value) for key, value in options.items()})
    return {
        str(split.name): [row for _, row in builder._generate_examples(**split.gen_kwargs)]
        for split in builder._split_generators(None)
    }


def context(text, image=""):
    return "c" + hashlib.sha256(f"{text}\0{image}".encode()).hexdigest()[:16]


def test_mentions_by_hand(raw):
    rows = rows_of("mentions", mentions=raw / "mentions.jsonl", entities=raw / "entities.tsv")
    first, third, fourth = context("Ada met Bo.", "pictures/a.jpg"), context("Cy ist müde 😴"), context("Cy again")
    keys = ("mention_id", "context_id", "mention", "start", "end", "entity_id", "topic", "candidates")
    assert {split: [tuple(row[key] for key in keys) for row in part] for split, part in rows.items()} == {
        "train": [
            (f"{first}-0", first, "Ada", 0, 3, "E1", "", []),
            (f"{first}-1", first, "Bo", 8, 10, NIL, "", []),
            ("bobo-0", "bobo", "Bo", 4, 6, "2", "", []),
        ],
        # Its file leaves the place open; the other "Bo" of the text is taken.
        "validation": [("m4", "bobo", "Bo", 0, 2, NIL, "", [])],
        "test": [
            (third, third, "😴", 12, 13, "E3", "sleep", []),
            (fourth, fourth, "Bo", -1, -1, "E3", "", ["E3", "E1"]),
        ],
    }
    image = {"bytes": (raw / "pictures/a.jpg").read_bytes(), "path": None}
    assert [row["image"] for row in rows["train"]] == [image, image, None]
    assert all(set(row) == set(mention_features()) for part in rows.values() for row in part)


def test_entities_and_posts_by_hand(raw):
    files = {"mentions": raw / "mentions.jsonl", "entities": raw / "entities.tsv", "posts": raw / "posts.json"}
    entities = rows_of("entities", **files)["kb"]
    assert [(row["entity_id"], row["name"], row["attributes"], row["aliases"]) for row in entities] == [
        ("E1", "Ada Falk", "Occupation: sailor.", ["Ada", "A. F."]),
        ("2", "Bo Falk", 'Said "no",\tthen yes.', []),
        ("E3", "Cy", "", []),
    ]
    names = ["e1.png", "a.jpg"]
    assert [image["bytes"] for image in entities[0]["images"]] == [(raw / "pictures" / n).read_bytes() for n in names]
    assert all(set(row) == set(entity_features()) for row in entities)
    posts = rows_of("posts", **files)["kb"]
    assert [(row["post_id"], row["entity_id"], row["text"], row["image"] is None) for row in posts] == [
        ("post-0", "E1", "Ahoy", False),
        ("7", "2", "No.", True),
    ]
    assert all(set(row) == set(post_features()) for row in posts)


def test_a_file_per_split_gives_the_same_rows(raw, tmp_path):
    expected = rows_of("mentions", mentions=raw / "mentions.jsonl", entities=raw / "entities.tsv")
    jsonl_release.write_folder(tmp_path / "folder")
    assert rows_of("mentions", mentions=tmp_path / "folder", entities=tmp_path / "folder") == expected
    alone = rows_of("mentions", mentions=tmp_path / "folder/test.csv", entities=tmp_path / "folder/entities.tsv")
    assert alone == {"test": expected["test"]}


def test_only_configurations_with_files_are_built(raw, tmp_path):
    files = {"mentions": str(raw / "mentions.jsonl"), "entities": str(raw / "entities.tsv")}
    report = build_dataset("jsonl", output=tmp_path / "out", config_options=files)
    assert report.counts == {"mentions": {"train": 3, "validation": 1, "test": 2}, "entities": {"kb": 3}}
    assert report.problems == {"mention_not_in_text": [("mentions/test", context("Cy again"), "Bo")]}
    assert set(report.raw_sha256) == {"mentions.jsonl", "entities.tsv"}
    assert load_dataset(str(tmp_path / "out"), split="train")[0]["image"].size == (24, 16)


def test_image_folders_of_their_own(raw, tmp_path):
    (raw / "pictures").rename(tmp_path / "pictures")
    files = {"mentions": raw / "mentions.jsonl", "entities": raw / "entities.tsv"}
    assert rows_of("mentions", **files, entity_images=tmp_path)["train"][0]["image"] is None
    assert rows_of("mentions", **files, images=tmp_path, entity_images=tmp_path)["train"][0]["image"] is not None
    with pytest.raises(DataFormatError, match="is not a folder"):
        rows_of("mentions", **files, images=tmp_path / "typo", entity_images=tmp_path)


def build_mentions(tmp_path, *mentions, name="mine.jsonl", entities='{"id": "E1", "name": "Ada"}\n', **options):
    """Builds from these rows of mentions."""
    path, kb = tmp_path / name, tmp_path / "entities.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mentions) if mentions else "", encoding="utf-8")
    kb.write_text(entities, encoding="utf-8")
    return rows_of("mentions", mentions=path, entities=kb, **options)


ROW = {"text": "Ada met Bo.", "mention": "Ada", "entity_id": "E1", "split": "train"}


def test_hashed_splits_keep_contexts_whole(tmp_path):
    rows = [{"text": f"Ada {k} Ada", "mention": "Ada", "entity_id": "E1"} for k in range(400) for _ in "ab"]
    dealt = build_mentions(tmp_path, *rows, split="hash")
    assert {split: {row["context_id"] for row in part} for split, part in dealt.items()} == {
        split: {
            context(row["text"])
            for row in rows
            if int.from_bytes(hashlib.sha256(context(row["text"]).encode()).digest(), "big") % 10 in rest
        }
        for split, rest in (("train", range(2, 10)), ("validation", [0]), ("test", [1]))
    }
    assert sum(map(len, dealt.values())) == 800
    assert 0.75 < len(dealt["train"]) / 800 < 0.85
    # Neither the order of the rows nor the others change where one goes.
    again = build_mentions(tmp_path, *rows[300:100:-1], split="hash")
    where = {row["text"]: split for split, part in dealt.items() for row in part}
    assert all(where[row["text"]] == split for split, part in again.items() for row in part)
    assert hashed_split("c") in ("train", "validation", "test")


@pytest.mark.parametrize("spelling", [None, "", "nil", "NIL", "None", "null", " [NIL] "])
def test_nil_in_every_spelling(tmp_path, spelling):
    assert build_mentions(tmp_path, {**ROW, "entity_id": spelling})["train"][0]["entity_id"] == NIL


@pytest.mark.parametrize("entity_id", ["None", "null", "nil"])
def test_an_id_is_any_string_so_a_spelling_of_nil_can_name_an_entity(tmp_path, entity_id):
    entities = "".join(json.dumps({"id": name, "name": "Bo"}) + "\n" for name in (entity_id, "E1"))
    golds = [entity_id, "NIL", "", "[nil]"]
    mentions = [{**ROW, "text": f"Bo {k}", "mention": "Bo", "entity_id": gold} for k, gold in enumerate(golds)]
    rows = build_mentions(tmp_path, *mentions, entities=entities)["train"]
    assert [row["entity_id"] for row in rows] == [entity_id, NIL, NIL, NIL]


def test_given_offsets_come_before_searched_ones_in_any_order(tmp_path):
    text = "Bo, Bo and Bo"
    rows = [
        {
            "text": text,
            "mention": "Bo",
            "start": start,
            "end": start and start + 2,
            "entity_id": "E1",
            "split": "train",
        }
        for start in (None, 4, None)
    ]
    for order in permutations(rows):
        actual = build_mentions(tmp_path, *order)["train"]
        assert sorted(row["start"] for row in actual) == [0, 4, 11]
        assert [row["start"] for row, given in zip(actual, order, strict=True) if given["start"] is not None] == [4]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"entitiy_id": "E1"}, DataFormatError, "column 'entitiy_id'.*Did you mean 'entity_id'"),
        ({"id": "a", "mention_id": "a"}, DataFormatError, "'mention_id' twice"),
        ({"text": ""}, DataFormatError, "has no 'text'"),
        ({"text": 5}, DataFormatError, "'text' is 5"),
        ({"mention": None}, DataFormatError, "has no 'mention'"),
        ({"mention": ["Ada"]}, DataFormatError, "'mention' is"),
        ({"entity_id": "E9"}, UnknownEntityError, "gold 'E9' is not among the entities.*'NIL'"),
        ({"entity_id": True}, DataFormatError, "'entity_id' is True"),
        ({"entity_id": 1.0}, DataFormatError, "'entity_id' is 1.0"),
        ({"start": 0}, SpanError, "one of 'start' and 'end'"),
        ({"start": 1, "end": 4}, SpanError, "at 1:4 is 'da '.*The mention is at 0:3"),
        ({"start": "x", "end": 4}, SpanError, "'start' is 'x'"),
        ({"start": 10**12, "end": 4}, SpanError, "'start' is"),
        ({"start": -3, "end": -1}, SpanError, "text at -3:-1"),
        ({"mention": "Cy", "start": 0, "end": 2}, SpanError, "is not in the text"),
        ({"image": {"bytes": "x"}}, DataFormatError, "'image' is"),
        ({"candidates": [1]}, DataFormatError, "'candidates' is"),
        ({"candidates": 5}, DataFormatError, "'candidates' is"),
        ({"split": ""}, DataFormatError, "has no 'split'"),
        ({"split": "my split"}, DataFormatError, "cannot be the name of a split"),
        ({"split": "all"}, DataFormatError, "cannot be the name of a split"),
        ({"context_id": "c", "text": "Ada and others"}, DataFormatError, "has the context 'c'"),
        ({"mention_id": "first"}, DuplicateIdError, "'first' is also that of mine.jsonl, row 1"),
        ({"topic": "\ud800"}, DataFormatError, "surrogate"),
    ],
)
def test_a_bad_row_is_named_with_its_remedy(tmp_path, change, error, message):
    with pytest.raises(error, match=message) as caught:
        build_mentions(tmp_path, {**ROW, "mention_id": "first", "context_id": "c"}, {**ROW, **change})
    assert (caught.value.file, caught.value.row) == (tmp_path / "mine.jsonl", 2)


def test_errors_of_whole_files(tmp_path):
    without = {key: value for key, value in ROW.items() if key != "entity_id"}
    with pytest.raises(DataFormatError, match="has no 'entity_id'") as caught:
        build_mentions(tmp_path, ROW, without)
    assert caught.value.row == 2
    without = {key: value for key, value in ROW.items() if key != "split"}
    with pytest.raises(DataFormatError, match=r"which split.*--option split=hash"):
        build_mentions(tmp_path, without)
    assert list(build_mentions(tmp_path, without, name="dev.jsonl")) == ["validation"]
    with pytest.raises(DataFormatError, match="has no 'split'") as caught:
        build_mentions(tmp_path, ROW, without)
    assert caught.value.row == 2
    with pytest.raises(DataFormatError, match="split='random' is not 'hash'"):
        build_mentions(tmp_path, ROW, split="random")
    with pytest.raises(DataFormatError, match="holds no mentions"):
        build_mentions(tmp_path)
    with pytest.raises(KnowledgeBaseError, match="holds no entities"):
        build_mentions(tmp_path, ROW, entities="\n")


@pytest.mark.parametrize(
    ("entities", "error", "message"),
    [
        ('{"id": "E1", "name": "a"}\n{"id": null, "name": "b"}', DataFormatError, "no 'id'"),
        ('{"id": "E1", "name": "a"}\n{"id": "E1", "name": "b"}', DuplicateIdError, "entities.jsonl, row 1"),
        ('{"id": "E1", "name": "a"}\n{"id": "E2", "nmae": "b"}', DataFormatError, "Did you mean 'name'"),
    ],
)
def test_bad_entities(tmp_path, entities, error, message):
    with pytest.raises(error, match=message) as caught:
        build_mentions(tmp_path, ROW, entities=entities)
    assert (caught.value.file, caught.value.row) == (tmp_path / "entities.jsonl", 2)


@pytest.mark.parametrize("config", ["entities", "mentions"])
def test_all_bad_rows_of_all_files_are_told_in_one_error(tmp_path, config):
    """Rows of bad entities give no second error to the mentions of them."""
    entities = [
        '{"id": "E1", "name": "Ada"}',
        '{"id": "E2"}',
        '{"id": " E1", "name": "Bo"}',
        '{"id": "E3", "name": "Cy"',
    ]
    (tmp_path / "entities.jsonl").write_text("\n".join(entities))
    mentions = [
        ROW,
        {**ROW, "entity_id": "E2", "context_id": "x"},
        {**ROW, "entity_id": "E9"},
        {**ROW, "text": ""},
        {**ROW, "text": "Ada", "context_id": "x"},
    ]
    path = tmp_path / "mentions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mentions))
    with pytest.raises(DataFormatError) as caught:
        rows_of(config, mentions=path, entities=tmp_path / "entities.jsonl")
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 rows cannot be used:"
    positions = [line.partition(": ")[0].strip().removeprefix(f"{tmp_path}/") for line in lines[1:]]
    assert positions == [
        *(f"entities.jsonl, row {row}" for row in (2, 3, 4)),
        *(f"mentions.jsonl, row {row}" for row in (3, 4, 5)),
    ]
    assert "The gold 'E9'" in str(caught.value)


def test_ids_match_whatever_spaces_and_unicode_form_they_have(tmp_path):
    lome = "Lom\u00e9"
    entities = "".join(json.dumps({"id": i, "name": "n"}) + "\n" for i in ("E1 ", unicodedata.normalize("NFD", lome)))
    rows = build_mentions(
        tmp_path,
        {**ROW, "entity_id": " E1", "candidates": ["E1\u00a0", unicodedata.normalize("NFD", lome)], "id": " m "},
        {**ROW, "entity_id": lome, "mention": "Bo"},
        entities=entities,
    )["train"]
    assert [(row["entity_id"], row["candidates"]) for row in rows] == [("E1", ["E1", lome]), (lome, [])]
    assert rows[0]["mention_id"] == "m"


def test_a_mention_in_another_unicode_form_is_found_and_listed(tmp_path):
    """The mention is written as its text is, so that the text at its offsets is the mention."""
    composed, decomposed = "Lom\u00e9", "Lome\u0301"
    (tmp_path / "e.csv").write_text("id,name\nE1,x\n")
    rows = [
        {"text": f"in {decomposed}!", "mention": composed, "entity_id": "E1"},
        {"text": f"In {composed}!", "mention": decomposed, "entity_id": "E1", "start": 3, "end": 7},
        {"text": f"{composed}, {decomposed}", "mention": composed + ", " + composed, "entity_id": "E1"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"mentions": str(tmp_path / "train.jsonl"), "entities": str(tmp_path / "e.csv")}
    report = build_dataset("jsonl", output=tmp_path / "out", config_options=files)
    built = load_dataset(str(tmp_path / "out"), split="train")
    assert [row["text"][row["start"] : row["end"]] for row in built][:2] == [decomposed, composed]
    assert [row["mention"] for row in built] == [decomposed, composed, rows[2]["mention"]]
    assert [row[:2] for row in report.problems["mention_in_other_unicode_form"]] == [
        ("train.jsonl", "1"),
        ("train.jsonl", "2"),
        ("mentions/train", built[2]["mention_id"]),  # the text itself has both forms
    ]


MUSEUM = {
    "mentions": "caption;who;QID;part\nAda met Bo.;Ada;7;train\n",
    "entities": 'QID;artist;sex;placeOfBirth;url\n7;"Falk, Ada";f;Rome;http://example.org\n',
}


def museum(tmp_path, *columns, **options):
    for name, content in MUSEUM.items():
        (tmp_path / f"{name}.csv").write_text(content)
    files = {name: str(tmp_path / f"{name}.csv") for name in MUSEUM}
    builders = [
        Jsonl(config_name=config, column=[*columns], **files, **options) for config in ("mentions", "entities")
    ]
    return [
        row
        for builder in builders
        for split in builder._split_generators(None)
        for _, row in builder._generate_examples(**split.gen_kwargs)
    ]


def test_columns_are_assigned_to_the_files_that_have_them(tmp_path):
    """entity_id=QID is the gold of the mentions and the id of the entities."""
    columns = (
        "text=caption",
        "mention=who",
        "entity_id=QID",
        "split=part",
        "name=artist",
        "attributes=sex,placeOfBirth",
    )
    mention, entity = museum(tmp_path, *columns, ignore_other_columns=True, inverted_names="true")
    assert (mention["text"], mention["mention"], mention["entity_id"]) == ("Ada met Bo.", "Ada", "7")
    assert {key: entity[key] for key in ("entity_id", "name", "attributes", "aliases")} == {
        "entity_id": "7",
        "name": "Falk, Ada",
        "attributes": "Sex: f. Place of birth: Rome.",
        "aliases": ["Ada Falk"],
    }
    with pytest.raises(DataFormatError, match="columns 'sex', 'placeOfBirth', 'url' are unknown"):
        museum(tmp_path, *columns[:-1])
    with pytest.raises(
        DataFormatError, match=r"no column 'artists', which --column name=artists names.*mean 'artist'"
    ):
        museum(tmp_path, *columns[:-2], "name=artists", ignore_other_columns=True)
    with pytest.raises(DataFormatError, match=r"'txt' of --column txt=caption is unknown.*mean 'text'"):
        museum(tmp_path, "txt=caption")
    with pytest.raises(DataFormatError, match="ignore_other_columns='no' is neither true nor false"):
        museum(tmp_path, *columns, ignore_other_columns="no")


def test_missing_files_are_errors_that_say_what_to_give(raw, tmp_path):
    files = {"mentions": raw / "mentions.jsonl", "entities": raw / "entities.tsv"}
    with pytest.raises(DataFormatError, match=r"No entities were given.*--entities FILE"):
        rows_of("entities", mentions=files["mentions"])
    with pytest.raises(DataFormatError, match="cannot be read"):
        rows_of("mentions", **{**files, "mentions": tmp_path / "typo.jsonl"})
    with pytest.raises(DataFormatError, match=r"is not one of \.jsonl, \.json, \.csv, \.tsv"):
        rows_of("mentions", **{**files, "mentions": raw / "pictures/a.jpg"})
    with pytest.raises(DataFormatError, match="holds no file of mentions"):
        rows_of("mentions", **{**files, "mentions": raw / "pictures"})


def test_a_broken_picture_becomes_null_and_is_listed(raw, tmp_path):
    (raw / "pictures/a.jpg").write_bytes(picture("red")[:100])
    files = {"mentions": str(raw / "mentions.jsonl"), "entities": str(raw / "entities.tsv")}
    report = build_dataset("jsonl", output=tmp_path / "out", config_options=files)
    assert len(report.problems["broken_image"]) == 3  # two mentions, one entity
    assert load_dataset(str(tmp_path / "out"), split="train")[0]["image"] is None


def write_with_bad_images(tmp_path):
    """Writes mentions, entities and posts with good, broken and missing images; the options that build them."""
    (tmp_path / "good.png").write_bytes(picture("red", form="PNG"))
    (tmp_path / "broken.png").write_bytes(picture("red", form="PNG")[:60])
    text = {"text": "Ada met Bo.", "split": "train"}
    rows = {
        "mentions": [
            {**text, "mention": "Ada", "entity_id": "E1", "image": "gone.png", "context_id": "a"},
            {**text, "mention": "Bo", "entity_id": "E2", "image": "good.png"},
            {**text, "mention": "Bo", "entity_id": "E2", "image": "broken.png"},
            {**text, "mention": "Ada", "entity_id": "E1", "image": "x" * 5000},
            {**text, "mention": "Ada", "entity_id": "E1", "image": str(tmp_path / "private" / "gone.png")},
        ],
        "entities": [
            {"id": "E1", "name": "Ada", "images": ["gone.png", "broken.png", "good.png"]},
            {"id": "E2", "name": "Bo", "images": ["good.png", "lost.png"]},
            {"id": "E3", "name": "Cy", "image": "broken.png"},
        ],
        "posts": [{"entity_id": "E1", "text": "Hello.", "image": "gone.png"}],
    }
    for name, lines in rows.items():
        (tmp_path / f"my_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(tmp_path / f"my_{name}.jsonl") for name in rows}


def test_missing_and_broken_images_are_listed_by_file_and_row_and_their_rows_go_on(tmp_path):
    report = build_dataset("jsonl", output=tmp_path / "out", config_options=write_with_bad_images(tmp_path))
    missing = {kind: entries for kind, entries in report.problems.items() if kind.startswith("missing")}
    assert missing == {
        "missing_mention_image": [
            ("my_mentions.jsonl", "1", "gone.png"),
            ("my_mentions.jsonl", "4", "x" * 200),
            ("my_mentions.jsonl", "5", "gone.png"),
        ],
        "missing_entity_image": [("my_entities.jsonl", "1", "gone.png"), ("my_entities.jsonl", "2", "lost.png")],
        "missing_post_image": [("my_posts.jsonl", "1", "gone.png")],
    }
    broken = report.problems["broken_image"]
    assert [(file, row) for file, row, _ in broken] == [
        ("my_entities.jsonl", "1"),
        ("my_entities.jsonl", "3"),
        ("my_mentions.jsonl", "3"),
    ]
    assert all("damaged" in detail for *_, detail in broken)
    assert (report.num_missing_images, len(broken)) == (6, 3)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["problems"]["missing_entity_image"]["entries"]["my_entities.jsonl"][1] == ["2", "lost.png"]
    assert str(tmp_path) not in json.dumps(saved)
    mentions = load_dataset(str(tmp_path / "out"), split="train")
    assert [row["image"] is not None for row in mentions] == [False, True, False, False, False]
    entities = load_dataset(str(tmp_path / "out"), "entities", split="kb")
    assert [len(row["images"]) for row in entities] == [1, 1, 0]


@pytest.mark.parametrize(
    ("bad", "file", "row", "message"),
    [
        ({"entities", "mentions"}, "my_entities.jsonl", "1", r"An image is missing \(gone\.png\)"),
        ({"mentions"}, "my_mentions.jsonl", "1", r"An image is missing \(gone\.png\)"),
        ({"broken"}, "my_mentions.jsonl", "3", "The image is damaged"),
    ],
)
def test_a_strict_build_stops_at_the_first_and_writes_nothing(tmp_path, bad, file, row, message):
    options = write_with_bad_images(tmp_path)
    del options["posts"]
    if "entities" not in bad:
        (tmp_path / "my_entities.jsonl").write_text('{"id": "E1", "name": "Ada"}\n{"id": "E2", "name": "Bo"}')
    if bad == {"broken"}:
        lines = (tmp_path / "my_mentions.jsonl").read_text().splitlines()
        (tmp_path / "my_mentions.jsonl").write_text(lines[0].replace("gone", "good") + "\n" + "\n".join(lines[1:3]))
    with pytest.raises(ImageError, match=message) as caught:
        build_dataset("jsonl", output=tmp_path / "out", config_options=options, strict=True)
    assert (caught.value.file, caught.value.row) == (file, row)
    assert not list(tmp_path.glob("*out*"))
    build_dataset("jsonl", output=tmp_path / "out", config_options=options)


def test_an_interrupted_build_is_not_finished_strictly_with_bad_images(tmp_path, monkeypatch):
    options = write_with_bad_images(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_mel.building.build._check_staged_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_dataset("jsonl", output=tmp_path / "out", config_options=options)
    with pytest.raises(ImageError, match=r"my_entities\.jsonl, row 1: "):
        build_dataset("jsonl", output=tmp_path / "out", config_options=options, strict=True)
    assert not (tmp_path / "out").exists()
