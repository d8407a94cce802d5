"""Tests of posts from captions and entities, and of posts as mentions."""

from __future__ import annotations

import datasets
import pytest
from PIL import Image

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.posts import (
    SOURCE_TEXT,
    captions_as_posts,
    entities_as_mentions,
    entity_as_post,
    posts_as_mentions,
    posts_of,
)
from hf_mel.errors import UnknownSplitError
from hf_mel.schema import entity_features, mention_features, post_features
from tests.toy import toy_entities, toy_mentions, write_toy_dataset
from tests.toy_posts import toy_posts

RED = Image.new("RGB", (2, 2), "red")


def mentions(*rows: dict) -> datasets.Dataset:
    default = {"context_id": "c", "mention_type": "", "topic": "", "image": None, "entity_id": "Q1", "candidates": []}
    filled = [{**default, "mention_id": f"m{k}", "start": -1, "end": -1, **row} for k, row in enumerate(rows)]
    return datasets.Dataset.from_list(filled, features=mention_features())


def test_a_caption_loses_only_its_mention():
    posts = captions_as_posts(
        mentions(
            {"text": "Swift met  Swift.", "mention": "Swift", "start": 11, "end": 16},
            {"text": "Swift met Swift.", "mention": "Swift"},  # without a span, the first occurrence
            {"text": "He left.", "mention": "Swift"},  # not in the text
            {"text": "Swift", "mention": "Swift", "start": 0, "end": 5},  # no text remains
            {"text": "Swift", "mention": "Swift", "start": 0, "end": 5, "image": RED},
            {"text": "Nobody knows Swift", "mention": "Swift", "entity_id": "NIL"},
        )
    )
    assert posts["post_id"][:] == ["m0", "m1", "m2", "m4"]
    assert posts["text"][:] == ["Swift met .", "met Swift.", "He left.", ""]
    assert posts[SOURCE_TEXT][:] == ["Swift met  Swift.", "Swift met Swift.", "He left.", "Swift"]
    assert [row["image"] is None for row in posts] == [True, True, True, False]
    assert set(posts.column_names) == {*post_features(), SOURCE_TEXT}


def test_all_mentions_except_nil_give_posts():
    rows = toy_mentions(20, nil_every=5)
    posts = captions_as_posts(rows)
    expected = [
        (row["mention_id"], row["entity_id"], " ".join((row["text"][:5] + row["text"][row["end"] :]).split()))
        for row in rows
        if row["entity_id"] != "NIL"
    ]
    assert list(zip(posts["post_id"], posts["entity_id"], posts["text"], strict=True)) == expected


def test_posts_as_mentions_have_the_mention_schema():
    posts = toy_posts()
    rows = posts_as_mentions(posts)
    assert {name: rows.features[name] for name in mention_features()} == dict(mention_features())
    for post, row in zip(posts, rows, strict=True):
        assert row["mention_id"] == row["context_id"] == post["post_id"]
        assert (row["text"], row["entity_id"]) == (post["text"], post["entity_id"])
        assert (row["mention"], row["start"], row["end"], row["candidates"]) == ("", -1, -1, [])
        assert (row["image"] is None) == (post["image"] is None)


def test_mentions_of_entities_say_what_the_knowledge_base_says():
    blue = Image.new("RGB", (2, 2), (0, 0, 255))
    swift = {"entity_id": "Q7", "name": "Swift", "description": "singer", "aliases": ["Taylor"], "images": [RED, blue]}
    rows = [
        {**swift, "attributes": "Born: 1989. Died: . Genre: pop, folk."},
        {"entity_id": "Q8", "name": "", "description": "", "attributes": "", "aliases": [], "images": []},
        {"entity_id": "Q9", "name": "", "description": None, "attributes": None, "aliases": [], "images": [RED]},
    ]
    entities = datasets.Dataset.from_list(rows, features=entity_features())
    made = entities_as_mentions(entities, 40)
    assert made.features == mention_features()
    assert [row["entity_id"] for row in made] == ["Q7"] * 40 + ["Q9"] * 40  # nothing is known of Q8
    assert len(set(made["mention_id"])) == 80
    known = {"singer.", "Born: 1989.", "Died:.", "Genre: pop, folk.", "Swift.", "Taylor."}
    texts, names, colours = set(), set(), set()
    for row in made.select(range(40)):
        rest = row["text"]
        for sentence in known:
            rest = rest.replace(sentence, "", 1)
        assert not rest.strip(), row["text"]
        assert row["text"]
        texts.add(row["text"])
        names.add(row["mention"])
        colours.add(row["image"].getpixel((0, 0)))
        if row["mention"]:
            assert row["text"][row["start"] : row["end"]] == row["mention"]
        else:
            assert (row["start"], row["end"]) == (-1, -1)
    assert len(texts) > 10
    assert names == {"", "Swift", "Taylor"}
    assert colours == {(255, 0, 0), (0, 0, 255)}
    assert set(made.select(range(40, 80))["text"]) == {""}
    assert entities_as_mentions(entities, 2)[:] == entities_as_mentions(entities, 2)[:]
    assert entities_as_mentions(entities, 9)["text"][:] != entities_as_mentions(entities, 9, seed=1)["text"][:]


def test_an_entity_gives_a_post_about_itself():
    full = {"entity_id": "Q7", "name": "Swift", "description": "singer", "attributes": "Born: 1989.", "aliases": []}
    plain = entity_as_post({**full, "images": [RED]})
    assert dict(plain) == {
        "post_id": "Q7",
        "entity_id": "Q7",
        "text": "Swift. singer. Born: 1989.",
        "image": RED,
    }
    bare = entity_as_post({"entity_id": "Q8", "name": "Swift", "description": "", "attributes": None, "images": None})
    assert (bare["text"], bare["image"]) == ("Swift.", None)
    rows = datasets.Dataset.from_list([{**full, "images": [RED, RED]}], features=entity_features())
    lazy = entity_as_post(LazyRows(rows)[0])
    assert lazy["image"].getpixel((0, 0)) == (255, 0, 0)
    assert len(lazy) == len(list(lazy)) == 4


def test_only_the_first_image_of_an_entity_is_opened(tmp_path):
    broken = {"path": None, "bytes": b"no image"}
    good = {"path": None, "bytes": (tmp_path / "a.png", RED.save(tmp_path / "a.png"))[0].read_bytes()}
    row = {"entity_id": "Q1", "name": "A", "description": "", "attributes": "", "aliases": []}
    rows = datasets.Dataset.from_list([{**row, "images": [good, broken]}], features=entity_features())
    assert entity_as_post(LazyRows(rows)[0])["image"].size == (2, 2)


def write(folder, posts=None):
    """Writes a toy data set, with a `posts` configuration if posts are given."""
    write_toy_dataset(folder)
    if posts is not None:
        card = (folder / "README.md").read_text()
        config = "- config_name: posts\n  data_files:\n  - {split: kb, path: posts/kb.parquet}\n---"
        (folder / "README.md").write_text(config.join(card.rsplit("---", 1)))
        (folder / "posts").mkdir()
        posts.to_parquet(folder / "posts/kb.parquet")
    return folder


def test_posts_come_from_the_posts_configuration_or_from_captions(tmp_path):
    with_posts = write(tmp_path / "with_posts", toy_posts())
    assert posts_of(with_posts)["post_id"][:] == toy_posts()["post_id"][:]
    assert SOURCE_TEXT in posts_of(with_posts, "train").column_names
    assert posts_of(with_posts, "none") is None

    captions = write(tmp_path / "captions")
    expected = [
        row["mention_id"] for row in datasets.load_dataset(str(captions), split="train") if row["entity_id"] != "NIL"
    ]
    assert posts_of(captions)["post_id"][:] == expected
    with pytest.raises(UnknownSplitError, match="'nothing'"):
        posts_of(captions, "nothing")

    test_only = write_toy_dataset(tmp_path / "test_only", entities=toy_entities(), test=toy_mentions())
    assert posts_of(test_only) is None
