from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.dataset_scripts.nytimes_mel.nytimes_mel import NYTimesMel, with_mentions
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL, mention_features
from tests.dataset_scripts.fixtures import write_json
from tests.dataset_scripts.nytimes_mel_release import CAPTIONS, write_12n, write_121, write_dataset
from tests.dataset_scripts.raw import edited, edits, reads_or_raises, rows_of

FORMS = {"nel_12n": write_12n, "nel_121": write_121, "dataset": write_dataset}


def short(row):
    return (row["mention_id"], row["context_id"], row["mention"], row["start"], row["end"], row["entity_id"])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_mentions(tmp_path, form):
    raw = FORMS[form](tmp_path / "raw")
    rows, builder = rows_of(NYTimesMel, raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        "train": [
            ("32-0", "32", "Addie", 0, 5, "Q901"),
            ("32-1", "32", "Bo", 11, 13, "Q902"),
            ("32-2", "32", "Junior", 18, 24, NIL),
        ],
        "validation": [("31", "31", "Addie", 0, 5, "Q901")],
        "test": [
            ("33-1", "33-1", "Bo Falk", 0, 7, "Q902"),
            ("34-0", "34", "José", 0, 4, "Q904"),
            ("34-1", "34", "Ada Falk", 12, 20, "Q901"),
        ],
    }
    for row in (row for part in rows.values() for row in part):
        _, after, image, _ = CAPTIONS[row["context_id"]]
        assert row["text"] == after
        path = raw / image
        assert row["image"] == ({"bytes": path.read_bytes(), "path": None} if path.is_file() else None)
        assert set(row) == set(mention_features())
    file = f"{form}.json"
    assert builder.release.problems == {
        "missing_mention_image": [(file, "34", "imgs/gone.jpg")],
        "name_without_qid": [(file, "32", "32-2")],
        "split_id_without_caption": [("splits.json", "39", "test")],
    }


@pytest.mark.parametrize("form", FORMS)
def test_entities_by_hand(tmp_path, form):
    raw = FORMS[form](tmp_path / "raw")
    rows, builder = rows_of(NYTimesMel, raw, "entities", tmp_path)
    assert [(row["entity_id"], row["name"], row["aliases"], len(row["images"])) for row in rows["kb"]] == [
        ("Q901", "Ada Falk", [], 1),
        ("Q902", "Bo Falk", [], 0),
        ("Q904", "José Brun", ["Joseph Brun"], 0),
        ("Q905", "Cy Orr", [], 0),
    ]
    assert [row for _, row, _ in builder.release.problems["missing_entity_image"]] == ["Q902", "Q904", "Q905"]


def test_golds_come_without_ne2qid_too(tmp_path):
    raw = write_12n(tmp_path / "raw")
    (raw / "ne2qid.json").unlink()
    rows, _ = rows_of(NYTimesMel, raw, "entities", tmp_path)
    actual = {row["entity_id"]: row["name"] for row in rows["kb"]}
    assert actual == {"Q901": "Ada Falk", "Q902": "Bo Falk", "Q904": "José Brun"}


def test_numbered_captions_that_differ_are_no_group(tmp_path):
    sample = {"imgPath": "", "entities": "A", "answer": "Q1"}
    raw = tmp_path / "raw"
    samples = {f"5-{k}": {"sentence": f"A {word}", "mentions": word, **sample} for k, word in enumerate("xy")}
    write_json(raw / "nel_121.json", samples)
    write_json(raw / "splits.json", {"train": ["5-0"], "dev": ["5-1"], "test": []})
    rows, _ = rows_of(NYTimesMel, raw, "mentions", tmp_path)
    assert [row["context_id"] for row in rows["train"] + rows["validation"]] == ["5-0", "5-1"]


def test_splits_may_not_part_a_caption(tmp_path):
    raw = write_12n(tmp_path / "raw")
    write_json(raw / "splits.json", {"train": ["32-0", "32-1"], "dev": ["31", "32-2"], "test": []})
    with pytest.raises(DataFormatError, match="two splits") as caught:
        rows_of(NYTimesMel, raw, "mentions", tmp_path)
    assert caught.value.row == "32"


@pytest.mark.parametrize(
    ("sentence", "mentions", "names", "expected"),
    [
        ("Ann Lee Roy and Ann Lee", ["Annie", "Roy Jr"], ["Ann Lee", "Ann Lee Roy"], "Roy Jr and Annie"),
        ("Annie was here", ["Annie"], ["Ann Lee"], "Annie was here"),
        ("Ann Lee (Annie) was here", ["Annie"], ["Ann Lee"], "Ann Lee (Annie) was here"),
        ("Ann Lee Jr was here", ["Ann Lee Jr"], ["Ann Lee"], "Ann Lee Jr was here"),
        ("Lee met Ann Lee", ["Ann"], ["Ann Lee"], "Lee met Ann"),
        ("Ann Lee, Ann Lee", ["A.*"], ["Ann Lee"], "A.*, A.*"),
        ("Ann", ["", "x"], ["Ann", ""], "Ann"),
    ],
)
def test_names_give_way_to_mentions(sentence, mentions, names, expected):
    assert with_mentions(sentence, mentions, names) == expected
    assert with_mentions(expected, mentions, names) == expected


def test_a_string_for_a_list_and_other_keys(tmp_path):
    raw = write_12n(tmp_path / "raw")
    write_json(
        raw / "nel_12n.json", {"1": {"sentence": "x", "imgPath": "", "mentions": "x", "entities": [], "answer": []}}
    )
    with pytest.raises(DataFormatError, match="'mentions' is a str, expected list"):
        rows_of(NYTimesMel, raw, "mentions", tmp_path)
    write_json(raw / "nel_12n.json", {"1": {"caption": "x", "imgPath": "", "mentions": ["x"], "entities": ["x"]}})
    with pytest.raises(DataFormatError, match=r"lacks 'sentence', 'answer'; .*\"sentence\": \"caption\""):
        rows_of(NYTimesMel, raw, "mentions", tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FORMS)), st.sampled_from(["", "ne2qid", "splits"]), edits)
def test_changed_bytes_give_rows_or_a_typed_error(form, name, changes):
    with tempfile.TemporaryDirectory() as folder:
        raw = FORMS[form](Path(folder) / "raw")
        path = raw / f"{name or form}.json"
        path.write_bytes(edited(path.read_bytes(), changes))
        reads_or_raises(NYTimesMel, raw, Path(folder), ["mentions", "entities"])
