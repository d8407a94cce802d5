from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_mel.building.build import build_dataset
from hf_mel.dataset_scripts.tweets_mel.tweets_mel import TweetsMel, account_id, image_names, tweet_id
from hf_mel.errors import DataFormatError, DuplicateIdError, MelError
from tests.dataset_scripts.fixtures import picture
from tests.dataset_scripts.test_wikidiverse import mutations
from tests.dataset_scripts.tweets_mel_release import (
    ENTITIES,
    MENTIONS,
    PFMEL_SPLITS,
    POSTS,
    SPLITS,
    write,
    write_ids,
    write_pfmel,
)


def rows_of(raw, config, tmp_path, **options):
    """Split → rows, as `datasets` gets them from the builder."""
    builder = TweetsMel(config_name=config, data_dir=str(raw), cache_dir=str(tmp_path / "cache"), **options)
    rows = {
        str(split.name): [row for _, row in builder._generate_examples(**split.gen_kwargs)]
        for split in builder._split_generators(None)
    }
    return rows, builder


def short(row):
    columns = ("mention_id", "context_id", "text", "mention", "start", "end", "entity_id", "candidates")
    return (*(row[c] for c in columns), row["image"] is not None)


def kinds(builder):
    return {kind: [(file, row) for file, row, _ in entries] for kind, entries in builder.release.problems.items()}


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw")


def test_mentions_by_hand(raw, tmp_path):
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == MENTIONS
    assert kinds(builder) == {
        "repeated_row": [("Train.txt", "4")],
        "row_of_unlisted_tweet": [("Train.txt", "5")],
        "malformed_row": [("Train.txt", "6"), ("Train.txt", "7"), ("mapSreenNameToMention.txt", "4")],
        "malformed_id": [("mel_train_ids", "5")],
        "repeated_id": [("mel_train_ids", "6")],
        "id_list_not_as_released": [(name, "") for name in ("mel_train_ids", "mel_dev_ids", "mel_test_ids")],
        "tweet_gone": [("mel_train_ids", "1003"), ("mel_test_ids", "3003")],
        "span_repaired": [("Train.txt", "3"), ("Test.txt", "2"), ("Test.txt", "1")],
        "missing_mention_image": [("Dev.txt", "2")],
    }
    assert rows["train"][1]["image"]["bytes"] == (raw / "images" / "Dx2.jpg").read_bytes()


def test_entities_by_hand(raw, tmp_path):
    rows, builder = rows_of(raw, "entities", tmp_path)
    columns = ("entity_id", "name", "description", "attributes", "screen_name", "location", "recent_posts")
    assert [(*(row[c] for c in columns), len(row["images"])) for row in rows["kb"]] == ENTITIES
    assert [row["aliases"] for row in rows["kb"]] == [[entity[4]] for entity in ENTITIES]
    assert kinds(builder) == {
        "profile_of_unknown_account": [("profiles.tsv", "3")],
        "malformed_row": [("profiles.tsv", "4")],
    }


def test_images_of_an_entity_are_those_of_its_timeline_if_asked_for(raw, tmp_path):
    """T(e) of PFMEL, latest first. Without any such image, the profile picture stays."""
    for name, colour in (("entity_images/53.jpg", "red"), ("entity_images/jbrun.jpg", "green")):
        (raw / name).write_bytes(picture(colour))
    latest, oldest, profile, other = (
        (raw / "entity_images" / name).read_bytes() for name in ("53.jpg", "t51.jpg", "adafalk.png", "jbrun.jpg")
    )

    def images(number, **options):
        rows, _ = rows_of(raw, "entities", tmp_path / str(number), **options)
        return {row["entity_id"]: [image["bytes"] for image in row["images"]] for row in rows["kb"]}

    others = {"@bofalk": [], "@jbrun": [other], "@other_1": [], "@timeline_only": []}
    assert images(1) == images(2, timeline_images="0") == {"@adafalk": [profile], **others}
    assert images(3, timeline_images="all") == images(4, timeline_images=7) == {"@adafalk": [latest, oldest], **others}
    assert images(5, timeline_images="1") == {"@adafalk": [latest], **others}
    (raw / "timelineKB.txt").unlink()
    assert images(6, timeline_images="all")["@adafalk"] == [profile]
    for number, wrong in enumerate(("many", "-1")):
        with pytest.raises(DataFormatError, match=r"timeline_images is .*at least 0, or all"):
            images(10 + number, timeline_images=wrong)


def test_posts_by_hand(raw, tmp_path):
    rows, builder = rows_of(raw, "posts", tmp_path)
    actual = [(row["post_id"], row["entity_id"], row["text"], row["image"] is not None) for row in rows["kb"]]
    assert actual == POSTS
    assert builder.release.problems == {
        "id_list_not_as_released": [("kb", "", "7 ids, the release has 2,657,213")],
        "repeated_row": [("timelineKB.txt", "6", "54")],
        "row_of_unlisted_tweet": [("timelineKB.txt", "7", "99")],
        "malformed_row": [("timelineKB.txt", "8", "@AdaFalk\tx\tno id\t")],
        "tweet_gone": [("kb", "", "2 of 7 posts")],
        "missing_post_image": [("timelineKB.txt", "", "1 images are not there")],
    }


def test_posts_without_the_released_list(raw, tmp_path):
    (raw / "kb").unlink()
    (raw / "timelineKB.txt").rename(raw / "timeline_KB.txt")
    rows, builder = rows_of(raw, "posts", tmp_path)
    assert [row["post_id"] for row in rows["kb"]] == [*(post[0] for post in POSTS), "99"]
    assert kinds(builder)["missing_file"] == [("kb", "")]
    assert kinds(builder)["repeated_row"] == [("timeline_KB.txt", "6")]


def test_pfmel_draws_its_own_splits(raw, tmp_path):
    write_pfmel(raw)
    rows, builder = rows_of(raw, "pfmel", tmp_path)
    assert {split: [row["mention_id"] for row in part] for split, part in rows.items()} == {
        "train": ["3001", "2001"],
        "validation": ["1088612476130750001"],
        "test": ["1088612476130750002-0", "1088612476130750002-1", "3002"],
    }
    released = {row[0]: row for part in MENTIONS.values() for row in part}
    assert all(short(row) == released[row["mention_id"]] for part in rows.values() for row in part)
    assert kinds(builder) == {
        "id_list_not_as_released": [(f"{name}_ids.txt", "") for name in ("Train", "Dev", "Test")],
        "tweet_gone": [("Test_ids.txt", "3003")],
    }
    rows, _ = rows_of(raw, "pfmel_train07", tmp_path)
    assert [row["mention_id"] for row in rows["train"]] == ["3001"]
    with pytest.raises(DataFormatError, match="Train05_ids"):
        rows_of(raw, "pfmel_train05", tmp_path)


def test_configurations_are_those_whose_files_are_there(raw):
    assert TweetsMel.configs_in(raw, {}) == ["mentions", "entities", "posts"]
    write_pfmel(raw)
    (raw / "timelineKB.txt").unlink()
    assert TweetsMel.configs_in(raw, {}) == ["mentions", "entities", "pfmel", "pfmel_train07"]


def test_posts_without_timelines_say_what_to_write(raw, tmp_path):
    (raw / "timelineKB.txt").unlink()
    with pytest.raises(DataFormatError, match=r"timelineKB\.txt.*@screenName, tweetId, text, imageURL"):
        rows_of(raw, "posts", tmp_path)


@pytest.mark.parametrize("config", ["mentions", "entities", "posts"])
def test_ids_alone_name_every_file_and_column_needed(tmp_path, config):
    with pytest.raises(DataFormatError) as caught:
        rows_of(write_ids(tmp_path / "raw"), config, tmp_path)
    message = str(caught.value)
    for part in (
        "Train.txt, Dev.txt, Test.txt",
        "tweetId, startPos, endPos, mention, @screenName, text",
        "mediaURL",
        "mapSreenNameToMention.txt: @screenName|mention",
        "timelineKB.txt: @screenName, tweetId, text, imageURL",
        "https://github.com/OA256864/MEL_Tweets",
        "README",
    ):
        assert part in message
    assert caught.value.file == tmp_path / "raw"


def test_a_split_without_tweets_is_left_out(raw, tmp_path):
    (raw / "mel_dev_ids").write_text("777\n778\n")
    rows, builder = rows_of(raw, "mentions", tmp_path)
    assert list(rows) == ["train", "test"]
    assert kinds(builder)["split_left_out"] == [("mel_dev_ids", "")]
    for name in ("mel_train_ids", "mel_test_ids"):
        (raw / name).write_text("")
    with pytest.raises(DataFormatError, match="rows of none of the tweets"):
        rows_of(raw, "mentions", tmp_path)


def test_an_id_in_two_lists(raw, tmp_path):
    (raw / "mel_dev_ids").write_text("2001\n3001\n")
    with pytest.raises(DuplicateIdError, match="3001 is in mel_dev_ids too") as caught:
        rows_of(raw, "mentions", tmp_path)
    assert (caught.value.file, caught.value.row) == (raw / "mel_test_ids", 1)


def test_profiles_as_json_lines(raw, tmp_path):
    profiles = [
        {"screen_name": "BoFalk", "name": "Bo Falk", "description": None, "followers": 7},
        {"screen_name": "@adafalk", "description": "Sailor."},
        ["not", "an", "object"],
        {"screen_name": "@JBrun", "name": 5},
    ]
    lines = [*map(json.dumps, profiles), '{"screen_name": "@JBrun", "name": "\\ud83d"}', "{"]
    (raw / "profiles.jsonl").write_text("\n".join(lines))
    rows, builder = rows_of(raw, "entities", tmp_path)
    actual = {row["entity_id"]: (row["name"], row["description"]) for row in rows["kb"]}
    assert actual["@bofalk"] == ("Bo Falk", "")
    assert actual["@adafalk"] == ("Falk", "Sailor.")
    assert actual["@jbrun"] == ("Brun", "")
    assert kinds(builder)["malformed_row"] == [("profiles.jsonl", str(row)) for row in (3, 4, 5, 6)]


def test_without_map_and_timelines_the_accounts_are_the_golds(raw, tmp_path):
    for name in ("mapSreenNameToMention.txt", "timelineKB.txt", "profiles.tsv"):
        (raw / name).unlink()
    rows, _ = rows_of(raw, "entities", tmp_path)
    assert [(row["entity_id"], row["name"]) for row in rows["kb"]] == [
        ("@adafalk", "Falk"),
        ("@bofalk", "Falk"),
        ("@jbrun", "Brun"),
    ]
    rows, _ = rows_of(raw, "mentions", tmp_path)
    assert all(row["candidates"] == [] for part in rows.values() for row in part)


def test_accounts_are_the_same_in_any_case():
    assert account_id("@AdaFalk") == account_id(" adafalk ") == "@adafalk"
    assert [account_id(text) for text in ("", "@", "a b", "@é", "@@a")] == [""] * 5


def test_tweet_ids_stay_exact():
    assert tweet_id(" '1088612476130750465' ") == "1088612476130750465"
    assert [tweet_id(text) for text in ("", "1.0886E+18", "-1", "12 3", "1" * 20, "\u0661")] == [""] * 6


def test_image_names():
    assert image_names("https://a.org/media/Dx.jpg", "7") == ["Dx.jpg", "7.jpg", "7.png"]
    assert image_names("https://a.org/media/Dx.jpg:large", "7")[0] == "Dx.jpg:large"
    assert "Dx.jpg" in image_names("https://a.org/media/Dx?format=jpg&name=small", "7")
    assert image_names("", "7") == ["7.jpg", "7.png"]
    assert image_names("http://[a/b.jpg", "7")[0] == "b.jpg"


def test_builds_whole(raw, tmp_path):
    write_pfmel(raw)
    report = build_dataset("tweets_mel", raw_dir=raw, output=tmp_path / "out")
    assert report.counts == {**SPLITS, **PFMEL_SPLITS}
    assert len(report.problems["span_repaired"]) == 3
    assert len(report.problems["malformed_row"]) == 5
    assert "gold_not_in_kb" not in report.problems
    assert "candidate_not_in_kb" not in report.problems


@given(st.integers(0, 10**9))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_bytes_give_rows_or_a_typed_error(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("damaged")
    raw = write(folder / "raw")
    write_pfmel(raw)
    (raw / "Train05_ids.txt").write_text("3001\n")
    if seed % 2:
        (raw / "profiles.jsonl").write_text('{"screen_name": "@adafalk", "name": "Ada", "location": null}\n')
    path = random.Random(seed).choice(sorted(path for path in raw.iterdir() if path.is_file()))
    for data in mutations(path.read_bytes(), seed):
        path.write_bytes(data)
        for config in random.Random(seed).sample([config.name for config in TweetsMel.BUILDER_CONFIGS], 2):
            builder = TweetsMel(config_name=config, data_dir=str(raw), cache_dir=str(folder / "cache"))
            error = None
            try:
                for split in builder._split_generators(None):
                    for _, row in builder._generate_examples(**split.gen_kwargs):
                        row = builder.info.features.encode_example(row)
                        "".join(value for value in row.values() if isinstance(value, str)).encode()
                        if "mention" in row:
                            assert row["start"] < 0 or row["text"][row["start"] : row["end"]] == row["mention"]
            except MelError as raised:
                error = raised
            assert error is None or error.file is not None
