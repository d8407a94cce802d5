from __future__ import annotations

import hashlib
import json

import pytest

from hf_mel.dataset_scripts.richpediamel.richpediamel import RichpediaMel, held_out
from hf_mel.errors import DataFormatError
from tests.dataset_scripts.fixtures import picture, write_cleaned, write_ghmfc, write_json, write_kgmel


def rows_of(raw, config, tmp_path):
    builder = RichpediaMel(config_name=config, data_dir=str(raw), cache_dir=str(tmp_path / "cache"))
    rows = {
        str(split.name): [row for _, row in builder._generate_examples(**split.gen_kwargs)]
        for split in builder._split_generators(None)
    }
    return rows, builder


def test_validation_is_held_out_of_train_by_the_stated_rule(tmp_path):
    raw = write_ghmfc(tmp_path / "raw")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    train = list(json.loads((raw / "train.json").read_text()))
    digests = {qid: hashlib.sha256(qid.encode()).digest() for qid in train}
    expected = [qid for qid in train if int.from_bytes(digests[qid], "big") % 10 == 0]
    assert 0 < len(expected) < 30
    assert [row["entity_id"] for row in rows["validation"]] == expected
    assert [row["entity_id"] for row in rows["train"]] == [qid for qid in train if qid not in expected]
    assert [row["entity_id"] for row in rows["test"]] == list(json.loads((raw / "test.json").read_text()))
    assert builder.release.layout == "ghmfc"
    row = rows["test"][0]
    assert (row["mention_id"], row["context_id"], row["mention"]) == ("Q7030", "Q7030", "Person 30")
    assert row["text"][row["start"] : row["end"]] == "Person 30"


def test_every_missing_mention_image_is_listed_once(tmp_path):
    raw = write_ghmfc(tmp_path / "raw")
    (raw / "imgs").mkdir()
    (raw / "imgs" / "Q7031.jpg").write_bytes(picture("red"))
    rows, builder = rows_of(raw, "mentions", tmp_path)
    having = [row["entity_id"] for part in rows.values() for row in part if row["image"]]
    missing = [row for _, row, _ in builder.release.problems["missing_mention_image"]]
    assert having == ["Q7031"]
    assert sorted([*missing, *having]) == [f"Q{7000 + k}" for k in range(40)]


def test_without_the_test_file_there_is_no_test_split(tmp_path):
    rows, builder = rows_of(write_ghmfc(tmp_path / "raw", test=False), "mentions", tmp_path)
    assert list(rows) == ["train", "validation"]
    assert builder.release.layout == "ghmfc_train"


@pytest.mark.parametrize("long", [True, False])
def test_long_attributes_are_preferred(tmp_path, long):
    rows, _ = rows_of(write_ghmfc(tmp_path / "raw", long=long), "entities", tmp_path)
    assert rows["kb"][5]["attributes"] == ("Occupation: potter. Birth: 5." if long else "Occupation: potter.")
    assert [len(row["images"]) for row in rows["kb"]] == [int(k == 3) for k in range(40)]


def test_cleaned_layout_reads_its_plural_image_folder(tmp_path):
    raw = write_cleaned(tmp_path / "raw", "RichpediaMEL", mention_folder="mention_images")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert builder.release.layout == "mimic"
    assert {split: len(part) for split, part in rows.items()} == {"train": 3, "validation": 1, "test": 1}
    assert rows["test"][0]["image"]["bytes"] == (raw / "mention_images" / "13.jpg").read_bytes()


def test_bad_rows(tmp_path):
    raw = write_ghmfc(tmp_path / "raw")
    sample = {"id": "Q1", "sentence": "x", "mentions": "x", "answer": "Q1"}
    write_json(raw / "train.json", {"Q1": {**sample, "mentions": ["x"]}})
    with pytest.raises(DataFormatError, match="'mentions' is a list, expected str") as caught:
        rows_of(raw, "mentions", tmp_path)
    assert (caught.value.file, caught.value.row) == (raw / "train.json", "Q1")
    write_json(raw / "train.json", {"Q1": {**sample, "id": "Q2"}})
    with pytest.raises(DataFormatError, match="has the id 'Q2'"):
        rows_of(raw, "mentions", tmp_path)


def test_official_counts_add_up_to_the_release():
    ghmfc = RichpediaMel.OFFICIAL_COUNTS["ghmfc"]
    assert ghmfc["mentions"]["train"] + ghmfc["mentions"]["validation"] == 14_244
    assert sum(ghmfc["mentions"].values()) == ghmfc["entities"]["kb"]  # one mention per entity
    assert 0.08 < sum(held_out(f"Q{k}") for k in range(3_000)) / 3_000 < 0.12


def test_the_list_of_pictures_says_which_are_missing(tmp_path):
    raw = write_ghmfc(tmp_path / "raw")
    write_json(raw / "img_list.json", ["raw_data/imgs/Q7031.jpg", "raw_data/imgs/Q7032.jpg"])
    (raw / "raw_data/imgs").mkdir(parents=True)
    (raw / "raw_data/imgs/Q7031.jpg").write_bytes(picture("red"))
    (raw / "raw_data/imgs/Q7035.jpg").write_bytes(picture("blue"))  # not of the release
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert [row["entity_id"] for part in rows.values() for row in part if row["image"]] == ["Q7031"]
    assert builder.release.problems["missing_mention_image"] == [("test.json", "Q7032", "raw_data/imgs/Q7032.jpg")]
    write_json(raw / "img_list.json", ["a.jpg", None])
    with pytest.raises(DataFormatError, match="for an id") as caught:
        rows_of(raw, "mentions", tmp_path)
    assert (caught.value.file, caught.value.row) == (raw / "img_list.json", 1)


def test_kgmel(tmp_path):
    raw = write_kgmel(tmp_path / "raw", "RichpediaMEL")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert builder.release.layout == "kgmel"
    assert {split: len(part) for split, part in rows.items()} == {"train": 3, "validation": 1, "test": 2}
