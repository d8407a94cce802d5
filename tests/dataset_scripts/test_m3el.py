from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.dataset_scripts.m3el.m3el import M3EL, window
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL
from tests.dataset_scripts.fixtures import write_json
from tests.dataset_scripts.m3el_release import DOCUMENTS, LONG, write, write_lines
from tests.dataset_scripts.raw import edited, edits, reads_or_raises, rows_of


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw")


def short(row):
    return (row["mention_id"], row["modality"], row["mention"], row["start"], row["end"], row["entity_id"])


def test_mentions_by_hand(raw, tmp_path):
    rows, builder = rows_of(M3EL, raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        "train": [
            ("tt01-t0", "text", "Cape Man", 34, 42, "Cape Man"),
            ("tt01-t1", "text", "Falk", 23, 27, "77"),
            ("tt01-t2", "text", "Nordby", 15, 21, NIL),
            ("tt01-v0", "image", "", -1, -1, "77"),
            ("tt01-v2", "image", "", -1, -1, "Cape Man"),
        ],
        # After w50 to w149 and their spaces.
        "validation": [("2-t0", "text", "Falk", 50 * 4 + 50 * 5, 454, "77"), ("2-v0", "image", "", -1, -1, NIL)],
        "test": [("tt03-t0", "text", "Falk", 0, 4, "77")],
    }
    train = rows["train"]
    assert {row["document_id"] for row in train} == {"tt01"}
    assert [row["text"] for row in train] == [DOCUMENTS["train"][0]["text"]] * 3 + ["", ""]
    assert [row["candidates"] for row in train] == [["Cape Man", "77"], ["77", "Cape Man"], [], ["77"], []]
    assert [row["candidate_priors"] for row in train] == [[0.75, 0.25], [0.5, 0.125], [], [1.0], []]
    assert [row["region"] for row in train] == [[], [], [], [0.0, 0.0, 12.5, 16.0], []]
    images = [None] * 3 + [
        {"bytes": (raw / "images" / name).read_bytes(), "path": None} for name in ("tt01/1.jpg", "2.png")
    ]
    assert [row["image"] for row in train] == images
    assert all(set(row) == set(builder.info.features) for part in rows.values() for row in part)
    words = LONG.split()
    assert rows["validation"][0]["text"].split() == [*words[-100:], "Falk", *words[:100]]
    assert builder.release.problems == {
        "mention_not_in_document": [("train.jsonl", "1 (document tt01), mention 3", "Gotham")],
        "offsets_do_not_fit": [("train.jsonl", "1 (document tt01), mention 1", "Falk")],
        "visual_mention_without_image": [("train.jsonl", "1 (document tt01), visual mention 1", "gone.jpg")],
    }


def test_entities_by_hand(raw, tmp_path):
    rows, builder = rows_of(M3EL, raw, "entities", tmp_path)
    assert [(r["entity_id"], r["name"], r["description"], r["aliases"], len(r["images"])) for r in rows["kb"]] == [
        ("Cape Man", "Cape Man", "A hero.", ["The Cape"], 0),
        ("77", "Ada Falk", "", [], 1),
        ("78", "Bo Falk", "", [], 0),
    ]
    assert builder.release.problems == {"missing_entity_image": [("entities.jsonl", "2", "77_1.jpg")]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual_mentions": [{"image": "2.png", "gold": "77", "region": [1, 2, 3]}]}, "x0, y0, x1, y1"),
        ({"visual_mentions": [{"image": "2.png", "gold": "77", "region": [5, 0, 1, 9]}]}, "x0 < x1"),
        ({"visual_mentions": [{"image": "2.png", "gold": "77", "region": [0, 0, 1, "9"]}]}, "no finite number"),
        (
            {"mentions": [{"mention": "Cape", "gold": "77", "candidates": ["77"], "priors": [0.5, 0.5]}]},
            "1 candidates and 2 pr",
        ),
        ({"mentions": [{"mention": "Cape", "gold": "77", "candidates": [None]}]}, "for an id"),
        ({"mentions": [{"mention": "Cape", "gold": "77", "start": "3"}]}, "'start' is a str, expected int"),
        ({"mentions": ["Cape"]}, "is a str, expected an object"),
        ({"mentions": [{"surface": "Cape", "gold": "77"}]}, r'lacks \'mention\'; .*{"mention": "surface"}'),
    ],
)
def test_bad_documents(raw, tmp_path, change, message):
    write_lines(raw / "test.jsonl", [{"document_id": "tt03", "text": "Cape", "mentions": [], **change}])
    with pytest.raises(DataFormatError, match=message) as caught:
        rows_of(M3EL, raw, "mentions", tmp_path)
    assert caught.value.file == raw / "test.jsonl"
    assert str(caught.value.row).startswith("1 (document tt03), ")


@pytest.mark.parametrize("prior", [float("nan"), float("inf"), 10**40, True])
def test_priors_are_finite_numbers(raw, tmp_path, prior):
    mention = {"mention": "Cape", "gold": "77", "candidates": ["77"], "priors": [prior]}
    write_lines(raw / "test.jsonl", [{"document_id": "tt03", "text": "Cape", "mentions": [mention]}])
    with pytest.raises(DataFormatError, match="a prior that is no finite number"):
        rows_of(M3EL, raw, "mentions", tmp_path)


def test_half_a_character(raw, tmp_path):
    (raw / "test.jsonl").write_bytes(b'{"document_id": "tt03", "text": "\\ud83d", "mentions": []}')
    with pytest.raises(DataFormatError, match="is not JSON") as caught:
        rows_of(M3EL, raw, "mentions", tmp_path)
    assert caught.value.row == 1


def test_negative_offsets_do_not_fit(raw, tmp_path):
    mention = {"mention": "Falk", "gold": "77", "start": -4, "end": 4}
    write_lines(raw / "test.jsonl", [{"document_id": "tt03", "text": "Falk", "mentions": [mention]}])
    rows, builder = rows_of(M3EL, raw, "mentions", tmp_path)
    assert (rows["test"][0]["start"], rows["test"][0]["end"]) == (0, 4)
    assert ("test.jsonl", "1 (document tt03), mention 0", "Falk") in builder.release.problems["offsets_do_not_fit"]


def test_keys_are_mapped(raw, tmp_path):
    documents = [{"movie": {"imdb": "tt09"}, "text": "Falk", "mentions": [{"surface": "Falk", "wiki": "77"}]}]
    write_lines(raw / "test.jsonl", documents)
    write_json(raw / "keys.json", {"document_id": "movie.imdb", "mention": "surface", "gold": "wiki"})
    for split in ("train", "val"):
        write_lines(raw / f"{split}.jsonl", [])
    rows, _ = rows_of(M3EL, raw, "mentions", tmp_path, mapping=str(raw / "keys.json"))
    assert [short(row) for row in rows["test"]] == [("tt09-t0", "text", "Falk", 0, 4, "77")]


@given(st.text("ab \n", max_size=60), st.integers(0, 60), st.integers(1, 4), st.integers(1, 5))
def test_a_window_is_that_many_words(text, start, length, words):
    start = min(start, len(text))
    end = min(start + length, len(text))
    left, right = window(text, start, end, words)
    assert text[:start].endswith(left)
    assert text[end:].startswith(right)
    assert left.split() == text[:start].split()[-words:]
    assert right.split() == text[end:].split()[:words]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["train.jsonl", "val.jsonl", "entities.jsonl"]), edits)
def test_changed_bytes_give_rows_or_a_typed_error(name, changes):
    with tempfile.TemporaryDirectory() as folder:
        raw = write(Path(folder) / "raw")
        (raw / name).write_bytes(edited((raw / name).read_bytes(), changes))
        reads_or_raises(M3EL, raw, Path(folder), ["mentions", "entities"])
