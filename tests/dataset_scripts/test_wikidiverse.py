from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_mel.building.build import build_dataset
from hf_mel.dataset_scripts.wikidiverse import wikidiverse
from hf_mel.dataset_scripts.wikidiverse.wikidiverse import WikiDiverse, entity_key, image_names, is_nil, page_title
from hf_mel.errors import DataFormatError, MelError
from hf_mel.schema import NIL
from tests.dataset_scripts.fixtures import write_cleaned, write_json, write_kgmel
from tests.dataset_scripts.wikidiverse_release import (
    BARGE,
    CANDIDATE_ROWS,
    ENTITIES,
    GONE,
    MENTIONS,
    WIKI,
    stored,
    write,
    write_passages,
)


def rows_of(raw, config, tmp_path, **options):
    """Split → rows, as `datasets` gets them from the builder."""
    builder = WikiDiverse(config_name=config, data_dir=str(raw), cache_dir=str(tmp_path / "cache"), **options)
    rows = {
        str(split.name): [row for _, row in builder._generate_examples(**split.gen_kwargs)]
        for split in builder._split_generators(None)
    }
    return rows, builder


def short(row):
    columns = (
        "mention_id",
        "context_id",
        "mention",
        "start",
        "end",
        "mention_type",
        "topic",
        "entity_id",
        "candidates",
    )
    return (*(row[c] for c in columns), row["image"] is not None, row["entity_url"])


def named(rows):
    return [(row["entity_id"], row["name"], row["description"], len(row["images"])) for row in rows["kb"]]


def kinds(builder):
    return {kind: [(file, row) for file, row, _ in entries] for kind, entries in builder.release.problems.items()}


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw")


@pytest.fixture
def passages(tmp_path):
    return write_passages(tmp_path / "raw")


def test_mentions_with_candidates_by_hand(raw, tmp_path):
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == MENTIONS
    file = "wikidiverse_w_cands/{}_w_10cands.json"
    train, valid, test = (file.format(split) for split in ("train", "valid", "test"))
    assert kinds(builder) == {
        "span_repaired": [(train, "2")],
        "gold_missing_taken_as_nil": [(train, "3")],
        "empty_mention": [(train, "4")],
        "unusable_gold_url": [(train, "5")],
        "missing_mention_image": [(valid, "0")],
    }
    assert set(builder.release.sha256) == {train, valid, test}
    barge = (raw / "wikinewsImgs" / stored("Barge%20race_%282007%29.JPG", ".JPG")).read_bytes()
    assert rows["train"][0]["image"] == {"bytes": barge, "path": None}
    assert rows["train"][0]["text"] == "Ada Falk beats Nordby United."


def test_captions_give_the_same_mentions_without_candidates(passages, tmp_path):
    rows, builder = rows_of(passages, "mentions", tmp_path)
    for split, expected in MENTIONS.items():
        assert [short(row)[2:8] for row in rows[split]] == [row[2:8] for row in expected]
        assert all(row["candidates"] == [] for row in rows[split])
    assert [(row["mention_id"], row["context_id"]) for row in rows["train"]] == [
        ("train-0-0", "train-0"),
        ("train-0-1", "train-0"),
        ("train-1-0", "train-1"),
        ("train-1-1", "train-1"),
    ]
    # Not the caption counts of version 2: taken for version 1, and said so.
    assert builder.release.layout == "v1"
    assert kinds(builder)["not_version_2"] == [(f"{s}.json", "") for s in ("train", "valid", "test")]


def test_version_2_by_its_caption_counts(passages, tmp_path, monkeypatch):
    monkeypatch.setattr(wikidiverse, "_V2_CAPTIONS", {"train": 4, "valid": 2, "test": 1})
    _, builder = rows_of(passages, "mentions", tmp_path)
    assert builder.release.layout == "v2"
    assert "not_version_2" not in builder.release.problems


def test_one_sentence_under_two_images_is_two_contexts(raw, tmp_path):
    row = CANDIDATE_ROWS["test"][1]
    write_json(raw / "wikidiverse_w_cands" / "test_w_10cands.json", [row, [row[0], GONE, *row[2:]], row])
    rows, _ = rows_of(raw, "mentions", tmp_path)
    assert [row["context_id"] for row in rows["test"]] == ["test-0", "test-1", "test-0"]


def test_entities_are_golds_and_candidates(raw, tmp_path):
    rows, builder = rows_of(raw, "entities", tmp_path)
    assert named(rows) == ENTITIES
    table = "wikipedia_entity2desc_filtered.tsv"
    assert kinds(builder) == {
        "malformed_row": [(table, "5"), (table, "6")],
        "line_not_utf8": [(table, "9")],
        "duplicate_entity": [(table, "2")],
        "missing_entity_image": [("wikipedia_entity2imgs.tsv", "1")],
        "entity_without_row": [(table, key) for key in ("Bruno", "de:Hafen", "https://a.org/x")],
    }
    barge = (raw / "entity_images" / stored("Barge%20race_%282007%29.JPG", ".JPG")).read_bytes()
    assert rows["kb"][0]["images"][0]["bytes"] == barge


def test_unrestricted_adds_the_rest_of_the_table(raw, tmp_path):
    rows, builder = rows_of(raw, "entities", tmp_path, entities="all")
    assert named(rows) == [*ENTITIES[:4], ("Unrelated page", "Unrelated page", "Something else.", 1), *ENTITIES[4:]]
    assert kinds(builder)["duplicate_entity"] == [("wikipedia_entity2desc_filtered.tsv", "2")]
    assert kinds(builder)["malformed_row"] == [("wikipedia_entity2desc_filtered.tsv", row) for row in ("5", "6")]
    assert builder.release.problems["missing_entity_image"] == [
        ("wikipedia_entity2imgs.tsv", "", "1 linked images are not in the folder")
    ]


def test_restricted_to_a_file_of_pages(raw, tmp_path):
    listed = tmp_path / "kb.txt"
    listed.write_bytes(b"\xef\xbb\xbfAda-Falk\r\n\r\n" + f"{WIKI}Nobody\r\nUnrelated_page\r\nada Falk\n#x\n".encode())
    rows, builder = rows_of(raw, "entities", tmp_path, entities=str(listed))
    assert [row[0] for row in named(rows)] == ["Ada Falk", "Unrelated page", "Nobody"]
    assert kinds(builder)["unusable_page"] == [("kb.txt", "6")]
    assert kinds(builder)["entity_without_row"] == [("wikipedia_entity2desc_filtered.tsv", "Nobody")]
    with pytest.raises(DataFormatError, match="is not a file"):
        rows_of(raw, "entities", tmp_path, entities=str(tmp_path / "typo.txt"))


def test_without_the_tables(raw, tmp_path):
    for name in ("wikipedia_entity2desc_filtered.tsv", "wikipedia_entity2imgs.tsv"):
        (raw / name).unlink()
    rows, builder = rows_of(raw, "entities", tmp_path)
    assert {row[0] for row in named(rows)} == {row[0] for row in ENTITIES}
    assert all(row["description"] == "" and row["images"] == [] for row in rows["kb"])
    assert [file for file, _ in kinds(builder)["missing_file"]] == [
        "wikipedia_entity2desc_filtered.tsv",
        "wikipedia_entity2imgs.tsv",
    ]
    with pytest.raises(DataFormatError, match="lists all entities"):
        rows_of(raw, "entities", tmp_path, entities="all")


def test_cleaned_layout(tmp_path):
    raw = write_cleaned(tmp_path / "raw", "wiki_diverse")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert builder.release.layout == "mimic"
    assert {split: [row["entity_id"] for row in part] for split, part in rows.items()} == {
        "train": ["Q901", "Q904", "Q904"],
        "validation": [NIL],
        "test": ["Q903"],
    }
    assert {row["entity_url"] for part in rows.values() for row in part} == {""}
    rows, _ = rows_of(raw, "entities", tmp_path)
    assert [row["entity_id"] for row in rows["kb"]] == ["Q901", "Q904", "Q903"]


def test_kgmel_layout(tmp_path):
    raw = write_kgmel(tmp_path / "raw", "WikiDiverse")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert builder.release.layout == "kgmel"
    assert {split: len(part) for split, part in rows.items()} == {"train": 3, "validation": 1, "test": 2}
    rows, _ = rows_of(raw, "entities", tmp_path)
    assert len(rows["kb"]) == 3


@pytest.mark.parametrize(
    ("url", "key"),
    [
        (f"{WIKI}Detroit_Lions", "Detroit Lions"),
        (f"n{WIKI}Detroit_Lions", "Detroit Lions"),
        (f"h{WIKI}Detroit_Lions", "Detroit Lions"),
        (f"]{WIKI}Detroit_Lions", "Detroit Lions"),
        (f"[{WIKI}Detroit_Lions]", "Detroit Lions"),
        (f"{WIKI[1:]}Detroit_Lions", "Detroit Lions"),
        ("en.wikipedia.org/wiki/Detroit_Lions", "Detroit Lions"),
        ("http://en.m.wikipedia.org//wiki/Detroit_Lions", "Detroit Lions"),
        ("https://www.wikipedia.org/wiki/Detroit_Lions", "Detroit Lions"),
        ("https://en.wikipedia.org/w/index.php?title=Detroit_Lions&oldid=7", "Detroit Lions"),
        (f" {WIKI}Detroit_Lions \n", "Detroit Lions"),
        (f"{WIKI}Detroit%20Lions", "Detroit Lions"),
        (f"{WIKI}Detroit%5FLions", "Detroit Lions"),
        ("https%3A%2F%2Fen.wikipedia.org%2Fwiki%2FDetroit_Lions", "Detroit Lions"),
        (f"{WIKI}Detroit_Lions#History", "Detroit Lions"),
        (f"{WIKI}Detroit_Lions?oldid=12&x=3", "Detroit Lions"),
        (f"{WIKI}detroit_Lions", "Detroit Lions"),
        ("Detroit  Lions", "Detroit Lions"),
        (f"{WIKI}Jos%C3%A9", "José"),
        (f"{WIKI}Jos%25C3%25A9", "José"),
        (f"{WIKI}Jose\u0301", "José"),
        (f"{WIKI}Jos%E9", "Jos%E9"),
        (f"{WIKI}Who_Framed_Roger_Rabbit%3F", "Who Framed Roger Rabbit?"),
        (f"{WIKI}AC/DC", "AC/DC"),
        (f"{WIKI}100%25", "100%"),
        (f"{WIKI}Jean-Claude_Juncker", "Jean Claude Juncker"),
        ("Jean-Claude Juncker", "Jean Claude Juncker"),
        ("https://de.wikipedia.org/wiki/Detroit_Lions", "de:Detroit Lions"),
        (f"{WIKI}NIL", "en:NIL"),  # the page of that name is not the absence of one
        (WIKI, ""),
        ("#top", ""),
        ("", ""),
    ],
)
def test_every_spelling_of_a_page(url, key):
    assert entity_key(url) == key


@given(
    st.text("aZ é-_%2/?#.:[w", max_size=12), st.sampled_from(["", WIKI, f"n{WIKI}", "https://fr.wikipedia.org/wiki/"])
)
def test_a_key_is_one_line_without_spelling(text, prefix):
    key = entity_key(prefix + text)
    assert key == " ".join(key.split())
    assert "_" not in key or ":/" in text
    assert key != NIL
    assert bool(key) == bool(page_title(prefix + text)[1].replace("-", " ").strip())


@pytest.mark.parametrize("url", ["nil", "NIL", "Nil", " nil ", "nil\n", "[nil]", "", " "])
def test_nil_in_every_spelling(url):
    assert is_nil(url)


def test_jean_claude_keeps_his_hyphen():
    assert page_title(f"{WIKI}Jean-Claude_Juncker") == ("en", "Jean-Claude Juncker")
    assert not is_nil(f"{WIKI}Nil")


def test_image_names():
    names = list(image_names(BARGE))
    assert names[0] == stored("Barge%20race_%282007%29.JPG", ".JPG")
    assert stored("Barge race_(2007).JPG", ".JPG") in names
    assert list(image_names("https://a.org/b/c.svg")) == [stored("c.svg", ".png")]
    assert next(image_names("https://a.org/b/c.jpg.jpeg ")) == stored("c.jpg.jpeg", ".jpeg")
    assert stored("c.gif", ".gif") in image_names("c.gif")
    assert stored("a b.jpg", ".jpg") in image_names("x/a b.jpg")


@given(st.lists(st.sampled_from([".jpg", ".JPEG", ".svg", ".png", ".gif", "a", "b.", " ", "%20"]), max_size=6))
def test_suffix_is_what_the_released_expression_leaves(parts):
    name = "".join(parts)
    left = re.sub(r"(\S+(?=\.(jpg|JPG|png|PNG|svg|SVG)))|(\S+(?=\.(jpeg|JPEG)))", "", name)
    assert wikidiverse._released_suffix(name) == left


@pytest.mark.parametrize(
    ("rows", "message", "row"),
    [
        ([["too", "short"]], "has 2 fields, expected a list of 11", 0),
        ([7], "has a int, expected a list of 11", 0),
        ([[5, *CANDIDATE_ROWS["valid"][0][1:]]], "holds 5, expected a string", "0"),
        ([[*CANDIDATE_ROWS["valid"][0][:7], ["a", 3], *CANDIDATE_ROWS["valid"][0][8:]]], "holds 3", "0"),
        (
            [[*CANDIDATE_ROWS["valid"][0][:6], 0, [], *CANDIDATE_ROWS["valid"][0][8:]]],
            "holds 0, expected a string",
            "0",
        ),
        ([[*CANDIDATE_ROWS["valid"][0][:7], 8, *CANDIDATE_ROWS["valid"][0][8:]]], "holds 8, expected a list", "0"),
    ],
)
def test_rows_of_another_shape(raw, tmp_path, rows, message, row):
    path = raw / "wikidiverse_w_cands" / "valid_w_10cands.json"
    write_json(path, rows)
    for config in ("mentions", "entities"):
        with pytest.raises(DataFormatError, match=message) as caught:
            rows_of(raw, config, tmp_path)
        assert (caught.value.file, caught.value.row) == (path, row)


def test_half_a_surrogate_pair_is_refused(passages, tmp_path):
    (passages / "test.json").write_text('[["Falk \\ud83d", "", "x", [["Falk", "Person", 0, 4, "nil"]]]]')
    with pytest.raises(DataFormatError, match="surrogate"):
        rows_of(passages, "mentions", tmp_path)


def test_mentions_that_are_no_list(passages, tmp_path):
    write_json(passages / "test.json", [["Falk", GONE, "x", "Falk"]])
    with pytest.raises(DataFormatError, match="no list of mentions") as caught:
        rows_of(passages, "mentions", tmp_path)
    assert caught.value.row == 0


def test_offsets_of_every_kind_end_on_the_mention_or_nowhere(passages, tmp_path):
    spans = [(0, 4), ("0", " 4"), (None, None), (3.0, 7), (True, 4), (-4, 99), (10**30, 1), (8, 12), ([], {})]
    entries = [["Falk", "Person", start, end, "nil"] for start, end in spans]
    write_json(passages / "test.json", [["Falk or Falk", None, None, [*entries, ["Holm", None, 0, 4, "nil"]]]])
    rows, builder = rows_of(passages, "mentions", tmp_path)
    actual = [(row["start"], row["end"]) for row in rows["test"]]
    assert actual == [(0, 4), (0, 4), (0, 4), (0, 4), (0, 4), (0, 4), (8, 12), (8, 12), (0, 4), (-1, -1)]
    repaired = [row for file, row in kinds(builder)["span_repaired"] if file == "test.json"]
    assert repaired == [f"0-{k}" for k in (2, 3, 4, 5, 6, 8)]


def test_builds_whole(raw, tmp_path):
    report = build_dataset("wikidiverse", raw_dir=raw, output=tmp_path / "out", allow_count_mismatch=True)
    assert report.layout == "candidates"
    assert report.counts == {
        "mentions": {split: len(rows) for split, rows in MENTIONS.items()},
        "entities": {"kb": len(ENTITIES)},
    }
    assert "gold_not_in_kb" not in report.problems
    assert "candidate_not_in_kb" not in report.problems


def mutations(data: bytes, seed: int) -> Iterator[bytes]:
    """Cuts, changed and repeated bytes of a file."""
    chance = random.Random(seed)
    place = chance.randrange(len(data))
    other = bytes([chance.randrange(256)])
    yield data[:place]
    yield data[:place] + other + data[place + 1 :]
    yield data[:place] + other + data[place:]
    yield data[:place] + data[place + 1 :]
    yield data[:place] + chance.choice([b"null", b"[]", b"{}", b'"', b"\\ud800", b"9" * 30]) + data[place:]


@given(st.integers(0, 10**9), st.sampled_from(["candidates", "passages"]))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_bytes_give_rows_or_a_typed_error(tmp_path_factory, seed, layout):
    folder = tmp_path_factory.mktemp("damaged")
    raw = (write if layout == "candidates" else write_passages)(folder / "raw")
    files = sorted(path for path in raw.rglob("*") if path.suffix in (".json", ".tsv"))
    path = random.Random(seed).choice(files)
    whole = path.read_bytes()
    for data in mutations(whole, seed):
        path.write_bytes(data)
        for config in ("mentions", "entities"):
            builder = WikiDiverse(
                config_name=config, data_dir=str(raw), cache_dir=str(folder / "cache"), entities="all"
            )
            error = None
            try:
                for split in builder._split_generators(None):
                    for _, row in builder._generate_examples(**split.gen_kwargs):
                        row = builder.info.features.encode_example(row)
                        json.dumps({k: v for k, v in row.items() if k not in ("image", "images")}).encode()
                        for value in row.values():
                            if isinstance(value, str):
                                value.encode()
                        if config == "mentions":
                            assert row["start"] < 0 or row["text"][row["start"] : row["end"]] == row["mention"]
            except MelError as raised:
                error = raised
            assert error is None or error.file is not None
