from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.dataset_scripts.mapping import split_of_context
from hf_mel.dataset_scripts.weibo_mel.weibo_mel import WeiboMel
from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import NIL, entity_features, mention_features
from tests.dataset_scripts.fixtures import write_json
from tests.dataset_scripts.raw import edited, edits, reads_or_raises, rows_of
from tests.dataset_scripts.weibo_mel_release import SAMPLES, write


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw")


def short(row):
    return (row["mention_id"], row["context_id"], row["mention"], row["start"], row["end"], row["entity_id"])


def test_mentions_by_hand(raw, tmp_path):
    rows, builder = rows_of(WeiboMel, raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        "train": [
            ("7001-0", "7001", "海棠", 0, 2, "Q901"),
            ("7001-1", "7001", "老柯", 11, 13, "902"),
            ("7002-0", "7002", "海棠花", 0, 3, "Q903"),
            ("7003", "7003", "小宋", 4, 6, NIL),
        ],
        "validation": [("7004", "7004", "海棠", 0, 2, "Q901")],
        "test": [("7005-0", "7005", "小宋", 0, 2, NIL), ("7005-1", "7005", "阿宋", 3, 5, "Q905")],
    }
    red, green = ({"bytes": (raw / "images" / name).read_bytes(), "path": None} for name in ("7001.jpg", "pic.png"))
    assert [row["image"] for row in rows["train"]] == [red, red, green, None]
    for row in (row for part in rows.values() for row in part):
        assert row["text"] == SAMPLES[row["context_id"]]["sentence"]
        assert set(row) == set(mention_features())
    assert builder.release.layout == "split_ids"
    assert builder.release.problems == {
        "mention_without_surface": [("Weibo-MEL.json", "7002", "7002-1")],
        "missing_mention_image": [("Weibo-MEL.json", row, f"{row}.jpg") for row in ("7003", "7004", "7005")],
        "post_without_split": [("Weibo-MEL.json", "7006", "")],
        "split_id_without_post": [("splits.json", "7099", "train")],
    }


def test_entities_by_hand(raw, tmp_path):
    rows, builder = rows_of(WeiboMel, raw, "entities", tmp_path, entities=str(raw / "texts.jsonl"))
    assert [(r["entity_id"], r["name"], r["description"], r["aliases"]) for r in rows["kb"]] == [
        ("Q901", "海棠（公司）", "一家公司。", ["海棠集团"]),
        ("902", "902", "一位企业家。", ["柯大山[企业家]"]),
        ("Q903", "海棠（植物）", "", []),
        ("Q905", "宋乙", "", []),
    ]
    assert all(set(row) == set(entity_features()) for row in rows["kb"])
    assert builder.release.problems == {
        "entity_without_text": [("entities", "Q903", "海棠（植物）"), ("entities", "Q905", "宋乙")]
    }
    assert set(builder.release.sha256) == {"Weibo-MEL.json", "splits.json", "texts.jsonl"}


def test_posts_by_hand(raw, tmp_path):
    rows, builder = rows_of(WeiboMel, raw, "posts", tmp_path, timelines=str(raw / "more/timelines.jsonl"))
    blue = {"bytes": (raw / "more/timeline_images/1.png").read_bytes(), "path": None}
    assert [tuple(row.values()) for row in rows["kb"]] == [
        ("1", "Q901", "今天发布新品", blue),
        ("2", "902", "", None),
        ("4", "Q903", "花开了", None),
    ]
    assert builder.release.problems == {
        "missing_post_image": [("timelines.jsonl", "2", "gone.jpg")],
        "post_about_no_gold": [("timelines.jsonl", "4", "Q999")],
        "repeated_post": [("timelines.jsonl", "3", "1")],
    }
    assert set(builder.release.sha256) == {"Weibo-MEL.json", "splits.json", "timelines.jsonl"}
    with pytest.raises(DataFormatError, match="timelines is not a file"):
        rows_of(WeiboMel, raw, "posts", tmp_path, timelines=str(raw / "none.jsonl"))
    (raw / "more/timelines.jsonl").write_text('{"id": "1", "text": "x"}')
    with pytest.raises(DataFormatError, match=r"row 1: The row lacks 'entity_id'"):
        rows_of(WeiboMel, raw, "posts", tmp_path, timelines=str(raw / "more/timelines.jsonl"))


def test_posts_are_built_only_with_timelines():
    assert WeiboMel.configs_in(None, {}) == ["mentions", "entities"]
    assert WeiboMel.configs_in(None, {"timelines": "file"}) == ["mentions", "entities", "posts"]


def test_split_files_come_first(raw, tmp_path):
    for name, key in (("train", "7001"), ("dev", "7004"), ("test", "7005")):
        sample = {k: v for k, v in SAMPLES[key].items() if k != "id"}
        write_json(raw / f"{name}.json", [sample])
    rows, builder = rows_of(WeiboMel, raw, "mentions", tmp_path)
    assert builder.release.layout == "split_files"
    ids = {split: [row["mention_id"] for row in part] for split, part in rows.items()}
    assert ids == {
        "train": ["train-0-0", "train-0-1"],
        "validation": ["validation-0"],
        "test": ["test-0-0", "test-0-1"],
    }


def test_without_splits_the_text_decides(raw, tmp_path):
    (raw / "splits.json").unlink()
    twin = {**SAMPLES["7001"], "id": "7100"}
    write_json(raw / "Weibo-MEL.json", {**SAMPLES, "7100": twin})
    rows, builder = rows_of(WeiboMel, raw, "mentions", tmp_path)
    assert builder.release.layout == "hashed"
    where = {row["context_id"]: split for split, part in rows.items() for row in part}
    assert set(where) == {*SAMPLES, "7100"}
    for key, sample in SAMPLES.items():
        tenth = int(hashlib.sha256(sample["sentence"].encode()).hexdigest()[:16], 16) % 10
        assert where[key] == (["train"] * 7 + ["validation"] + ["test"] * 2)[tenth]
    assert where["7100"] == where["7001"]


def test_the_rule_of_splits_is_near_70_10_20():
    splits = [split_of_context(f"text {k}") for k in range(5000)]
    assert 0.67 < splits.count("train") / 5000 < 0.73
    assert 0.08 < splits.count("validation") / 5000 < 0.12
    assert splits[:100] == [split_of_context(f" text {k}\n") for k in range(100)]


def test_other_keys_are_told_and_mapped(raw, tmp_path):
    renamed = {"sentence": "post", "mentions": "surfaces", "answer": "gold", "entities": "titles", "id": "id"}
    samples = {
        key: {renamed[k]: v for k, v in sample.items() if k in renamed and k != "answer"}
        | {"meta": {"gold": sample["answer"]}}
        for key, sample in SAMPLES.items()
    }
    write_json(raw / "Weibo-MEL.json", samples)
    with pytest.raises(DataFormatError) as caught:
        rows_of(WeiboMel, raw, "mentions", tmp_path)
    assert caught.value.row == "7001"
    message = str(caught.value)
    assert (
        "lacks 'sentence', 'mentions', 'answer'; it has the keys 'id', 'post', 'surfaces', 'titles', 'meta'" in message
    )
    example = json.loads(message[message.index("such as") + 8 : message.index(" and pass it")])
    assert example["sentence"] == "post"
    assert set(example) == {"sentence", "mentions", "answer"}
    mapping = {"sentence": "post", "mentions": "surfaces", "entities": "titles", "answer": "meta.gold"}
    write_json(raw / "keys.json", mapping)
    rows, _ = rows_of(WeiboMel, raw, "mentions", tmp_path, mapping=str(raw / "keys.json"))
    write(tmp_path / "plain")
    plain, _ = rows_of(WeiboMel, tmp_path / "plain", "mentions", tmp_path)
    for split in rows:  # the image of 7002 apart, whose key was left out
        assert [short(row) for row in rows[split]] == [short(row) for row in plain[split]]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ('{"sentense": "text"}', "maps 'sentense'; our keys are id, sentence"),
        ('{"sentence": 3}', "expected a key"),
        ("[]", "expected an object"),
        ("{", "is not JSON"),
        (None, "is not a file"),
    ],
)
def test_bad_mapping_files(raw, tmp_path, mapping, message):
    if mapping is not None:
        (raw / "keys.json").write_text(mapping)
    with pytest.raises(DataFormatError, match=message) as caught:
        rows_of(WeiboMel, raw, "mentions", tmp_path, mapping=str(raw / "keys.json"))
    assert caught.value.file == raw / "keys.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ["Q1"]}, "2 mentions, 1 answers and 2 entities"),
        ({"answer": ["Q1", {}]}, "for an id"),
        ({"mentions": [["海棠"], "x"]}, "a list among its mentions"),
        ({"sentence": None}, "'sentence' is null, expected str"),
        ({"id": True}, "'id' is a bool"),
    ],
)
def test_bad_samples(raw, tmp_path, change, message):
    write_json(raw / "Weibo-MEL.json", {**SAMPLES, "7001": {**SAMPLES["7001"], **change}})
    with pytest.raises(DataFormatError, match=message) as caught:
        rows_of(WeiboMel, raw, "mentions", tmp_path)
    assert (caught.value.file, caught.value.row) == (raw / "Weibo-MEL.json", "7001")


def test_an_id_in_two_splits(raw, tmp_path):
    write_json(raw / "splits.json", {"train": ["7001"], "valid": [7001], "test": []})
    with pytest.raises(DuplicateIdError, match="in train and in validation"):
        rows_of(WeiboMel, raw, "mentions", tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["Weibo-MEL.json", "splits.json", "texts.jsonl"]), edits)
def test_changed_bytes_give_rows_or_a_typed_error(name, changes):
    with tempfile.TemporaryDirectory() as folder:
        raw = write(Path(folder) / "raw")
        (raw / name).write_bytes(edited((raw / name).read_bytes(), changes))
        reads_or_raises(WeiboMel, raw, Path(folder), ["mentions", "entities"], entities=str(raw / "texts.jsonl"))
